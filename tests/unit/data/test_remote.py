"""Remote shards: fetched whole, checked and kept, whatever the server does."""

import errno
import hashlib
import multiprocessing
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest

from dist_transformer.config.data import DataConfig, RemoteConfig
from dist_transformer.data.cache import Fetchers, ShardCache
from dist_transformer.data.cursor import Cursor
from dist_transformer.data.lanes import LaneReader
from dist_transformer.data.manifest import load_manifest
from dist_transformer.data.plan import RunPlan, load_corpora
from dist_transformer.data.remote import fetch_bytes
from dist_transformer.data.shards import ShardSet
from dist_transformer.data.stream import TrainStream
from dist_transformer.errors import DataError
from tests.unit.data.bad_server import BadServer, serving
from tests.unit.data.conftest import MakeShards, numbered_pairs


@pytest.fixture
def folder(tmp_path: Path, make_shards: MakeShards) -> Path:
    make_shards(tmp_path / "served" / "data", numbered_pairs(3, lambda _: 40), "pairs")
    return tmp_path / "served" / "data"


@pytest.fixture
def server(folder: Path) -> Iterator[BadServer]:
    with serving(folder.parent) as server:
        yield server


@pytest.fixture
def remote(tmp_path: Path) -> RemoteConfig:
    return RemoteConfig(cache_dir=str(tmp_path / "cache"), attempts=4, backoff_s=0.01, timeout_s=5)


def shards_at(location: str, remote: RemoteConfig, on_bad_shard: str = "error") -> ShardSet:
    data = DataConfig(train=location, remote=remote, on_bad_shard=on_bad_shard)  # type: ignore[arg-type]
    return ShardSet.build(load_manifest(location, data), "train", data)


def all_samples(shards: ShardSet) -> list[list[list[int]]]:
    return [[side.tolist() for side in s] for i in range(len(shards)) for s in shards.samples(i)]


def test_a_folder_under_a_url_is_the_folder(folder: Path, server: BadServer, remote: RemoteConfig) -> None:
    local = shards_at(str(folder), remote)
    shards = shards_at(f"{server.url}/data/", remote)
    assert all_samples(shards) == all_samples(local)
    assert shards.layout.tokenizer_path is not None
    assert shards.layout.tokenizer_path.read_bytes() == (folder / "tokenizer.json").read_bytes()
    assert shards.location(1) == f"{server.url}/data/train-00001.tar"
    n_requests = len(server.requests)
    assert all_samples(shards_at(f"{server.url}/data/", remote)) == all_samples(local)
    assert len(server.requests) == n_requests, "everything is here now"


@pytest.mark.parametrize("scheme", ["memory", "file"])
def test_whatever_fsspec_opens(folder: Path, remote: RemoteConfig, tmp_path: Path, scheme: str) -> None:
    url = f"memory://bucket-{tmp_path.name}/data" if scheme == "memory" else folder.as_uri()
    if scheme == "memory":
        fsspec.filesystem("memory").put(str(folder), url, recursive=True)
    assert all_samples(shards_at(url, remote)) == all_samples(shards_at(str(folder), remote))
    with pytest.raises(DataError, match=r"nowhere/manifest.json does not exist"):
        load_manifest(f"{url}/nowhere", DataConfig(train="x", remote=remote))


def test_brace_patterns_of_urls(folder: Path, server: BadServer, remote: RemoteConfig) -> None:
    (folder.parent / "more").mkdir()
    for path in folder.iterdir():
        (folder.parent / "more" / path.name).write_bytes(path.read_bytes())
    shards = shards_at(server.url + "/{data,more}", remote)
    assert len(shards) == 6 and shards.location(3) == f"{server.url}/more/train-00000.tar"
    assert all_samples(shards)[:120] == all_samples(shards)[120:]
    assert server.count("train-00000.tar") == 1, "equal shards are fetched once"


class TestServers:
    """One shard of the folder, from servers that fail."""

    def open(self, server: BadServer, remote: RemoteConfig) -> bytes:
        manifest = load_manifest(f"{server.url}/data", DataConfig(train="x", remote=remote))
        info = manifest.train[0]
        with ShardCache(remote).open(info.location, info.bytes, info.sha256) as file:
            content = file.read()
        assert hashlib.sha256(content).hexdigest() == info.sha256
        return content

    def test_busy_twice_then_well(self, folder: Path, server: BadServer, remote: RemoteConfig) -> None:
        server.faults["train-00000.tar"] = [503, 503]
        assert self.open(server, remote) == (folder / "train-00000.tar").read_bytes()
        assert server.count("train-00000.tar") == 3

    def test_busy_for_ever(self, server: BadServer, remote: RemoteConfig) -> None:
        server.faults["train-00000.tar"] = [503] * 9
        with pytest.raises(
            DataError, match=r"train-00000.tar is unreachable after 4 attempts: the server answ.* 503"
        ):
            self.open(server, remote)
        assert server.count("train-00000.tar") == 4

    @pytest.mark.parametrize("ranges", [True, False])
    def test_it_dies_in_the_body(
        self, folder: Path, server: BadServer, remote: RemoteConfig, ranges: bool
    ) -> None:
        server.ranges = ranges
        server.faults["large.tar"] = [("die", 2_000_000), ("die", 1_000_000)]
        assert self.open_large(folder, server, remote)
        asked = [header for name, header in server.requests if name == "large.tar"]
        places = [int(header.removeprefix("bytes=").rstrip("-") or 0) for header in asked]
        assert len(places) == 3 and places[0] == 0 < places[1] <= 2_000_000
        if ranges:
            assert places[1] < places[2] <= places[1] + 1_000_000, "it goes on where it was"
        else:
            assert 0 < places[2] <= 1_000_000, "it begins anew"

    def open_large(self, folder: Path, server: BadServer, remote: RemoteConfig) -> bool:
        content = np.random.default_rng(0).bytes(4_000_000)
        (folder / "large.tar").write_bytes(content)
        digest = hashlib.sha256(content).hexdigest()
        with ShardCache(remote).open(f"{server.url}/data/large.tar", len(content), digest) as file:
            return file.read() == content

    def test_it_stalls(self, server: BadServer, remote: RemoteConfig) -> None:
        server.faults["train-00000.tar"] = [("stall", 3.0)]
        self.open(server, remote.model_copy(update={"timeout_s": 0.3}))
        assert server.count("train-00000.tar") == 2

    @pytest.mark.parametrize("status", [401, 403])
    def test_it_forbids(self, server: BadServer, remote: RemoteConfig, status: int) -> None:
        server.faults["train-00000.tar"] = [status] * 2
        with pytest.raises(
            DataError, match=rf"may not be read \(the server answered {status}.*\): .*credentials"
        ):
            self.open(server, remote)
        assert server.count("train-00000.tar") == 1, "asking again does not help"

    def test_it_has_no_such_file(self, folder: Path, server: BadServer, remote: RemoteConfig) -> None:
        (folder / "train-00000.tar").unlink()
        with pytest.raises(DataError, match=r"train-00000.tar does not exist: see data.train"):
            self.open(server, remote)
        assert server.count("train-00000.tar") == 1

    def test_it_serves_something_else(self, folder: Path, server: BadServer, remote: RemoteConfig) -> None:
        content = (folder / "train-00000.tar").read_bytes()
        server.faults["train-00000.tar"] = [
            ("say", b"<html>please log in</html>"),
            ("say", content + b"more"),
        ]
        assert self.open(server, remote) == content
        other = bytes(len(content))
        (Path(str(remote.cache_dir)) / hashlib.sha256(content).hexdigest()).unlink()
        server.faults["train-00000.tar"] = [("say", other), ("say", other)]
        with pytest.raises(DataError, match="is not the shard that manifest"):
            self.open(server, remote)
        assert [p.name for p in Path(str(remote.cache_dir)).glob("*.partial")] == []

    def test_nobody_listens(self, folder: Path, server: BadServer, remote: RemoteConfig) -> None:
        server.server_close()
        server.shutdown()
        with pytest.raises(
            DataError, match=r"manifest.json is unreachable after 4 attempts: ClientConnector"
        ):
            self.open(server, remote)

    def test_what_came_before_a_crash_is_continued(
        self, folder: Path, server: BadServer, remote: RemoteConfig
    ) -> None:
        server.faults["large.tar"] = [("die", 2_000_000)]
        once = remote.model_copy(update={"attempts": 1})
        with pytest.raises(DataError, match=r"is unreachable \(data.remote.attempts=1\)"):
            self.open_large(folder, server, once)
        assert self.open_large(folder, server, once)
        assert server.requests[-1][1] not in ("", "bytes=0-")

    def test_a_damaged_beginning_is_thrown_away(
        self, folder: Path, server: BadServer, remote: RemoteConfig
    ) -> None:
        content = (folder / "train-00000.tar").read_bytes()
        partial = (
            Path(str(remote.cache_dir)) / f"{hashlib.sha256(content).hexdigest()}.{len(content)}.partial"
        )
        partial.parent.mkdir()
        partial.write_bytes(b"x" * 500)
        assert self.open(server, remote) == content
        partial.write_bytes(b"x" * (len(content) + 5))
        (partial.parent / hashlib.sha256(content).hexdigest()).unlink()
        assert self.open(server, remote) == content


class TestPolicy:
    def test_an_unreachable_shard_is_skipped_and_counted(
        self, folder: Path, server: BadServer, remote: RemoteConfig
    ) -> None:
        server.faults["train-00001.tar"] = [503] * 99
        with pytest.raises(DataError, match=r"train-00001.tar is unreachable"):
            all_samples(shards_at(f"{server.url}/data", remote))
        shards = shards_at(f"{server.url}/data", remote, "skip")
        windows = [shards.open(i).read(100) for i in range(3)]
        assert [(len(window), window.n_bad) for window in windows] == [(40, 0), (0, 40), (40, 0)]
        assert "train-00001.tar is unreachable after 4 attempts" in windows[1].problem

    def test_a_manifest_from_elsewhere_names_nothing_else(
        self, folder: Path, server: BadServer, remote: RemoteConfig
    ) -> None:
        path = folder / "manifest.json"
        text = path.read_text()
        path.write_text(text.replace('"file": "train-00000.tar"', '"base": "/etc", "file": "passwd"'))
        with pytest.raises(DataError, match="may only list shards of its own folder"):
            load_manifest(f"{server.url}/data", DataConfig(train="x", remote=remote))
        path.write_text(text.replace('"file": "train-00000.tar"', '"file": "../x.tar"'))
        fetch_bytes.cache_clear()
        with pytest.raises(DataError, match="only plain file names of the same folder"):
            load_manifest(f"{server.url}/data", DataConfig(train="x", remote=remote))

    def test_another_tokenizer(self, folder: Path, server: BadServer, remote: RemoteConfig) -> None:
        with (folder / "tokenizer.json").open("a") as file:
            file.write("\n")
        with pytest.raises(DataError, match=r"data/tokenizer.json is not the file they were made with"):
            load_manifest(f"{server.url}/data", DataConfig(train="x", remote=remote))

    def test_unknown_places(self, remote: RemoteConfig) -> None:
        data = DataConfig(train="x", remote=remote)
        with pytest.raises(DataError, match=r"nosuch://.*Protocol not known: nosuch"):
            load_manifest("nosuch://bucket/data", data)

    def test_a_file_system_that_is_not_installed(
        self, remote: RemoteConfig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def url_to_fs(url: str, **options: object) -> None:
            raise ImportError("Install s3fs to access S3")

        monkeypatch.setattr(fsspec.core, "url_to_fs", url_to_fs)
        with pytest.raises(DataError, match=r"pip install s3fs \(or dist_transformer\[s3\]\)"):
            fetch_bytes("s3://bucket/manifest.json", remote)


def files_in(cache: RemoteConfig) -> set[str]:
    return {p.name for p in Path(str(cache.cache_dir)).glob("*") if p.name not in ("lock", "tokenizers")}


class TestCache:
    """Files of 1000 bytes and a cache of 3000."""

    @pytest.fixture
    def small(self, remote: RemoteConfig) -> RemoteConfig:
        return remote.model_copy(update={"cache_gib": 3000 / 2**30})

    def serve(self, folder: Path, n_files: int) -> list[tuple[str, int, str]]:
        """(name, size, sha256) of new files on the server."""
        files = []
        for i in range(n_files):
            content = np.random.default_rng(i).bytes(1000)
            (folder / f"{i}.tar").write_bytes(content)
            files.append((f"{i}.tar", 1000, hashlib.sha256(content).hexdigest()))
        return files

    def test_least_recently_used_first(self, folder: Path, server: BadServer, small: RemoteConfig) -> None:
        files = self.serve(folder, 5)
        cache = ShardCache(small)

        def use(i: int) -> None:
            name, size, sha256 = files[i]
            cache.open(f"{server.url}/data/{name}", size, sha256).close()

        for i in (0, 1, 2, 0):
            use(i)
            time.sleep(0.01)
        kept = cache.open(f"{server.url}/data/1.tar", *files[1][1:])
        os.utime(kept.fileno(), (1, 1))
        use(3)
        assert files_in(small) == {files[i][2] for i in (0, 2, 3)}, "1 was used longest ago"
        assert len(kept.read()) == 1000, "who has it open reads on"
        kept.close()
        use(4)
        assert files_in(small) == {files[i][2] for i in (0, 3, 4)}
        use(1)
        assert server.count("1.tar") == 2, "what is gone is fetched again"

    def test_other_files_and_those_being_fetched_stay(
        self, folder: Path, server: BadServer, small: RemoteConfig
    ) -> None:
        files = self.serve(folder, 4)
        cache = ShardCache(small)
        cache.folder.mkdir()
        (cache.folder / "mine.txt").write_bytes(b"x" * 5000)
        abandoned = cache.folder / f"{'0' * 64}.2500.partial"
        abandoned.write_bytes(b"x" * 10)
        server.faults["0.tar"] = [("stall", 1.0)]
        slow = threading.Thread(target=lambda: cache.open(f"{server.url}/data/0.tar", *files[0][1:]).close())
        slow.start()
        while server.count("0.tar") == 0:
            time.sleep(0.01)
        for i in (1, 2, 3):
            cache.open(f"{server.url}/data/{i}.tar", *files[i][1:]).close()
        assert not abandoned.exists(), "nobody goes on with it, and room was needed"
        slow.join()
        assert files_in(small) == {"mine.txt", *(files[i][2] for i in (0, 2, 3))}, "0 was being fetched"

    def test_too_large_for_the_cache(self, server: BadServer, small: RemoteConfig) -> None:
        with pytest.raises(DataError, match=r"0.00 GiB, more than data.remote.cache_gib="):
            ShardCache(small).open(f"{server.url}/data/train-00000.tar", 3001, "0" * 64)

    def test_a_full_disk(
        self, folder: Path, server: BadServer, small: RemoteConfig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        ((name, size, sha256),) = self.serve(folder, 1)
        from dist_transformer.data import cache as module

        def download(url: str, file: object, *rest: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(module, "download", download)
        with pytest.raises(
            DataError, match=r"the disk of data.remote.cache_dir=.*cache is full: lower data.rem"
        ):
            ShardCache(small).open(f"{server.url}/data/{name}", size, sha256)
        assert files_in(small) == set()

    def test_a_folder_that_cannot_be_written(self, tmp_path: Path, server: BadServer) -> None:
        (tmp_path / "file").write_text("")
        options = RemoteConfig(cache_dir=str(tmp_path / "file" / "cache"), attempts=1)
        with pytest.raises(DataError, match=r"data.remote.cache_dir=.*cannot be written \(Not a directory\)"):
            ShardCache(options).open(f"{server.url}/data/train-00000.tar", 1000, "0" * 64)

    def test_many_processes_fetch_once(self, folder: Path, server: BadServer, small: RemoteConfig) -> None:
        ((name, size, sha256),) = self.serve(folder, 1)
        server.faults[name] = [("stall", 0.5)]
        context = multiprocessing.get_context("spawn")
        arguments = (small, f"{server.url}/data/{name}", size, sha256)
        processes = [context.Process(target=_open_in_process, args=arguments) for _ in range(3)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        assert [process.exitcode for process in processes] == [0] * 3
        assert server.count(name) == 1
        assert files_in(small) == {sha256}

    def test_ahead_of_need(self, folder: Path, server: BadServer, small: RemoteConfig) -> None:
        files = self.serve(folder, 3)
        fetchers = Fetchers(small)
        server.faults["1.tar"] = [404]
        for name, size, sha256 in [*files, files[0], files[2]]:
            fetchers.ask(f"{server.url}/data/{name}", size, sha256)
        deadline = time.monotonic() + 60
        while files_in(small) != {files[0][2], files[2][2]} and time.monotonic() < deadline:
            time.sleep(0.01)
        assert files_in(small) == {files[0][2], files[2][2]}
        assert [server.count(name) for name, _, _ in files] == [1, 1, 1]
        ShardCache(small).open(f"{server.url}/data/1.tar", *files[1][1:]).close()


def _open_in_process(options: RemoteConfig, url: str, size: int, sha256: str) -> None:
    with ShardCache(options).open(url, size, sha256) as file:
        assert len(file.read()) == size


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_on_a_url_is_the_run_on_the_folder(
    tmp_path: Path, folder: Path, server: BadServer, remote: RemoteConfig, workers: int
) -> None:
    def batches(location: str) -> list[list[list[int]]]:
        data = DataConfig(
            train=location, objective="pairs", max_source_len=32, max_target_len=32, window=16, remote=remote,
            workers=workers,
        )  # fmt: skip
        with TrainStream(data, seed=1, dp_rank=0, dp_size=1, micro_batch_size=4) as stream:
            iterator = iter(stream)
            return [next(iterator).encoder_input_tokens.tolist() for _ in range(20)]

    assert batches(f"{server.url}/data") == batches(str(folder))
    assert [server.count(f"train-0000{i}.tar") for i in range(3)] == [1, 1, 1]


def test_a_lane_has_its_next_shard_fetched(folder: Path, server: BadServer, remote: RemoteConfig) -> None:
    data = DataConfig(
        train=f"{server.url}/data", objective="pairs", max_source_len=32, max_target_len=32, remote=remote,
        shuffle=False,
    )  # fmt: skip
    plan = RunPlan.build(data, load_corpora(data), n_lanes=1, seed=1)
    lane = LaneReader(plan.corpora[0], 0, 1, Cursor())
    assert lane.next_row().cursor.shard == 0
    deadline = time.monotonic() + 60
    while not server.count("train-00001.tar") and time.monotonic() < deadline:
        time.sleep(0.01)
    assert [server.count(f"train-0000{i}.tar") for i in range(3)] == [1, 1, 0]
