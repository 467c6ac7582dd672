"""Shards and manifests: what is written is read back, and everything else is one clear sentence."""

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dist_transformer.data.manifest import load_manifest
from dist_transformer.data.shards import ShardReader, open_shard, read_shard, write_shard
from dist_transformer.errors import DataError
from tests.unit.data.conftest import MakeShards, numbered_pairs

U16 = np.dtype("<u2")


def arrays(*lengths: int) -> list[tuple[np.ndarray, ...]]:
    return [(np.arange(3, 3 + n, dtype=np.uint16),) for n in lengths]


@pytest.mark.parametrize("dtype", ["<u2", "<u4"])
def test_round_trip(tmp_path: Path, dtype: str) -> None:
    written = [(np.array([5, 70000 % 2**16, 7]), np.array([9])), (np.array([1]), np.array([2, 3]))]
    info = write_shard(tmp_path / "train-00000.tar", "pairs", np.dtype(dtype), written)
    assert (info.n_samples, info.n_source_tokens, info.n_target_tokens) == (2, 4, 3)
    read = list(read_shard(tmp_path / "train-00000.tar", "pairs", np.dtype(dtype)))
    assert [[side.tolist() for side in sample] for sample in read] == [
        [s.tolist() for s in x] for x in written
    ]
    again = write_shard(tmp_path / "again.tar", "pairs", np.dtype(dtype), written)
    assert again.sha256 == info.sha256, "the bytes depend on the samples alone"


def test_windows(tmp_path: Path) -> None:
    path = tmp_path / "train-00000.tar"
    write_shard(path, "text", U16, arrays(1, 2, 3, 4, 5))
    reader = ShardReader(path, "text", U16, 100, 5)
    reader.skip(1)
    window = reader.read(3)
    assert window.first == 1 and window.fields[0][1].tolist() == [2, 3, 4]
    assert len(reader.read(3)) == 1 and len(reader.read(3)) == 0


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


@pytest.mark.parametrize(
    ("members", "sentence"),
    [
        ([("0.source", b"ab")], r"bad.tar, key 0: 0.target is missing"),
        ([("0.source", b"ab"), ("1.source", b"ab"), ("1.target", b"ab")], r"key 0: 0.target is missing"),
        ([("0.source", b"ab"), ("0.source", b"ab")], "key 0: source occurs twice"),
        ([("0.pkl", b"ab")], "holds the pickle '0.pkl': loading one can run any code"),
        ([("../../x.source", b"ab")], r"holds '../../x.source', which is no member of a pairs shard"),
        (
            [("0.tokens", b"ab")],
            r"holds '0.tokens', which is no member of a pairs shard \(KEY.source and KEY.target\)",
        ),
        (
            [("0.source", b"abc"), ("0.target", b"ab")],
            "sample 0: 3 bytes are no whole number of 2-byte tokens",
        ),
        (
            [("0.source", b"\xff\xff"), ("0.target", b"ab")],
            "sample 0: token 65535 is outside the vocabulary of 30000",
        ),
    ],
)
def test_members_that_are_refused(tmp_path: Path, members: list[tuple[str, bytes]], sentence: str) -> None:
    path = tmp_path / "bad.tar"
    write_tar(path, members)
    with pytest.raises(DataError, match=sentence):
        ShardReader(path, "pairs", U16, 30000).read(10)


@pytest.mark.parametrize("cut", [100, 512, 700, 3 * 1024, 3 * 1024 + 513])
def test_truncated_shards(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "train-00000.tar"
    write_shard(path, "text", U16, arrays(*range(1, 9)))
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(DataError, match=r"train-00000.tar (ends after|is damaged after sample) \d"):
        ShardReader(path, "text", U16, 100, 8).read(8)


def test_pipes_and_urls_are_refused() -> None:
    for name in ("pipe:touch /tmp/x", "| touch x"):
        with pytest.raises(DataError, match="pipes are not run"):
            open_shard(name)
    with pytest.raises(DataError, match="only local files are read"):
        open_shard("https://example.org/a.tar")
    with pytest.raises(DataError, match="cannot be opened"):
        open_shard("no/such.tar")


class TestManifest:
    @pytest.fixture
    def folder(self, tmp_path: Path, make_shards: MakeShards) -> Path:
        make_shards(tmp_path / "data", numbered_pairs(2, lambda _: 3), "pairs")
        return tmp_path / "data"

    def test_it_loads(self, folder: Path) -> None:
        manifest = load_manifest(folder)
        assert [shard.n_samples for shard in manifest.train] == [3, 3]
        content = json.loads((folder / "manifest.json").read_text())
        assert content["totals"]["train"]["n_samples"] == 6 and content["kind"] == "pairs"

    @staticmethod
    def _edit(folder: Path, change: Callable[[dict], object]) -> None:  # type: ignore[type-arg]
        path = folder / "manifest.json"
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    def test_missing_folder_or_manifest(self, folder: Path) -> None:
        with pytest.raises(DataError, match="does not exist: write one with `dist-transformer prepare`"):
            load_manifest(folder / "nowhere")
        with pytest.raises(DataError, match="is a file, not a folder"):
            load_manifest(folder / "manifest.json")
        (folder / "manifest.json").unlink()
        with pytest.raises(
            DataError, match=r"has no manifest.json: prepare it with `dist-transformer prepare"
        ):
            load_manifest(folder)
        (folder / "prepare.json").write_text("{}")
        with pytest.raises(DataError, match="is half-written"):
            load_manifest(folder)

    def test_remote_folders(self) -> None:
        with pytest.raises(DataError, match="local folders only"):
            load_manifest("s3://bucket/shards")

    def test_damaged_manifests(self, folder: Path) -> None:
        good = (folder / "manifest.json").read_text()
        for bad in ("{", "[]", '{"format": 1}', good.replace('"n_samples"', '"samples"')):
            (folder / "manifest.json").write_text(bad)
            with pytest.raises(DataError, match=r"manifest.json is damaged"):
                load_manifest(folder)
        (folder / "manifest.json").write_text(good.replace('"format": 1', '"format": 9'))
        with pytest.raises(DataError, match="has format 9, this version reads 1"):
            load_manifest(folder)

    def test_shards_that_are_missing_empty_or_cut(self, folder: Path) -> None:
        shard = folder / "train-00001.tar"
        content = shard.read_bytes()
        shard.write_bytes(content[:-512])
        with pytest.raises(DataError, match=r"train-00001.tar has \d+ bytes, manifest.json says \d+"):
            load_manifest(folder)
        shard.write_bytes(b"")
        with pytest.raises(DataError, match=r"train-00001.tar is empty"):
            load_manifest(folder)
        shard.unlink()
        with pytest.raises(DataError, match=r"train-00001.tar is listed in manifest.json but missing"):
            load_manifest(folder)
        self._edit(folder, lambda content: content["splits"].update(train=[], eval=[]))
        with pytest.raises(DataError, match="lists no shards"):
            load_manifest(folder)

    def test_shard_names_cannot_leave_the_folder(self, folder: Path) -> None:
        for name in ("../x.tar", "pipe:ls", "/etc/passwd"):
            self._edit(folder, lambda content, name=name: content["splits"]["train"][0].update(file=name))
            with pytest.raises(DataError, match="only plain file names of the same folder"):
                load_manifest(folder)

    def test_another_tokenizer(self, folder: Path) -> None:
        path = folder / "tokenizer.json"
        path.write_text(path.read_text() + "\n")
        with pytest.raises(DataError, match="the tokenizer does not match the shards"):
            load_manifest(folder)
        path.unlink()
        with pytest.raises(DataError, match=r"tokenizer.json is missing"):
            load_manifest(folder)
