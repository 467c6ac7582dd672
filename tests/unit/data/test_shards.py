"""Shards and manifests: what is written is read back, and everything else is one clear sentence."""

import io
import json
import pickle
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dist_transformer.config.data import DataConfig
from dist_transformer.data.layout import SampleLayout
from dist_transformer.data.manifest import MARK_EVERY, ShardInfo, load_manifest
from dist_transformer.data.shards import RAW, RawWindow, ShardReader, ShardSet, write_shard
from dist_transformer.data.tokenizer import TextTokenizer
from dist_transformer.errors import DataError
from tests.unit.data.conftest import MakeShards, numbered_pairs, sentences

U16 = np.dtype("<u2")
TEXT = SampleLayout("text", U16, 100)
PAIRS = SampleLayout("pairs", U16, 30000)


def arrays(*lengths: int) -> list[tuple[np.ndarray, ...]]:
    return [(np.arange(3, 3 + n, dtype=np.uint16),) for n in lengths]


def reader_of(path: Path, layout: SampleLayout, n_samples: int | None = None, **options: Any) -> ShardReader:
    return ShardReader(str(path), path.open("rb", buffering=0), layout, n_samples, **options)


def values(window: RawWindow) -> list[list[list[int]]]:
    """The tokens of each sample, field by field."""
    sides = [np.split(flat, np.cumsum(lengths)[:-1]) for flat, lengths in window.fields]
    return [[side.tolist() for side in sample] for sample in zip(*sides, strict=True)] if len(window) else []


@pytest.mark.parametrize("dtype", ["<u2", "<u4"])
def test_round_trip(tmp_path: Path, dtype: str) -> None:
    written = [(np.array([5, 70000 % 2**16, 7]), np.array([9])), (np.array([1]), np.array([2, 3]))]
    info = write_shard(tmp_path / "train-00000.tar", "pairs", np.dtype(dtype), written)
    assert (info.n_samples, info.n_source_tokens, info.n_target_tokens, info.marks) == (2, 4, 3, ())
    reader = reader_of(tmp_path / "train-00000.tar", SampleLayout("pairs", np.dtype(dtype), 30000))
    assert values(reader.read(9)) == [[side.tolist() for side in sample] for sample in written]
    again = write_shard(tmp_path / "again.tar", "pairs", np.dtype(dtype), written)
    assert again.sha256 == info.sha256, "the bytes depend on the samples alone"


def test_windows(tmp_path: Path) -> None:
    path = tmp_path / "train-00000.tar"
    write_shard(path, "text", U16, arrays(1, 2, 3, 4, 5))
    reader = reader_of(path, TEXT, 5)
    reader.skip(1)
    window = reader.read(3)
    assert window.first == 1 and window.indices.tolist() == [1, 2, 3] and window.n_bad == 0
    assert window.fields[0][1].tolist() == [2, 3, 4]
    assert len(reader.read(3)) == 1 and len(reader.read(3)) == 0
    reader.close()


@pytest.mark.parametrize("with_marks", [True, False])
def test_reading_starts_anywhere(tmp_path: Path, with_marks: bool) -> None:
    path = tmp_path / "train-00000.tar"
    n = 3 * MARK_EVERY + 5
    info = write_shard(path, "text", U16, ((np.array([i // 300, i % 300]),) for i in range(n)))
    assert len(info.marks) == 3 and all(mark % 512 == 0 for mark in info.marks)
    layout = SampleLayout("text", U16, 300)
    for place in (0, 1, MARK_EVERY - 1, MARK_EVERY, MARK_EVERY + 1, 3 * MARK_EVERY, n - 1):
        reader = reader_of(path, layout, n, marks=info.marks if with_marks else ())
        reader.skip(place // 2)
        reader.skip(place - place // 2)
        assert reader.position == place
        assert values(reader.read(1)) == [[[place // 300, place % 300]]]


def test_a_mark_saves_the_way(tmp_path: Path) -> None:
    path = tmp_path / "train-00000.tar"
    info = write_shard(path, "text", U16, arrays(*[1] * (MARK_EVERY + 2)))
    content = bytearray(path.read_bytes())
    content[: info.marks[0]] = bytes(info.marks[0])
    path.write_bytes(content)
    reader = reader_of(path, TEXT, info.n_samples, marks=info.marks)
    reader.skip(MARK_EVERY)
    assert len(reader.read(2)) == 2, "what lies before the mark was not looked at"


def write_tar(path: Path, members: list[tuple[str, bytes]], **options: Any) -> None:
    with tarfile.open(path, "w", **options) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


FAULTS = [
    ([("0.source", b"ab")], r"bad.tar, key 0: 0.target is missing"),
    ([("0.source", b"ab"), ("0.source", b"ab")], "key 0: source occurs twice"),
    ([("0.pkl", b"ab")], "key 0: it holds the pickle '0.pkl': loading one can run any code"),
    ([("../../x.source", b"ab")], r"it holds '../../x.source', a name that leads out of its folder"),
    (
        [("/etc/x.source", b"ab"), ("/etc/x.target", b"ab")],
        r"it holds '/etc/x.source', a name that leads out",
    ),
    ([("..\\x.source", b"ab")], r"x.source', a name that leads out of its folder"),
    ([("0.tokens", b"ab")], r"'0.tokens', which is no member of a pairs shard \(KEY.source and KEY.target\)"),
    ([("0.source", b"abc"), ("0.target", b"ab")], "key 0: 3 bytes are no whole number of 2-byte tokens"),
    (
        [("0.source", b"\xff\xff"), ("0.target", b"ab")],
        "key 0: token 65535 is outside the vocabulary of 30000",
    ),
]
GOOD = [("7.source", b"\1\0"), ("7.target", b"\2\0"), ("8.source", b"\3\0"), ("8.target", b"\4\0")]


@pytest.mark.parametrize(("members", "sentence"), FAULTS)
def test_bad_samples(tmp_path: Path, members: list[tuple[str, bytes]], sentence: str) -> None:
    path = tmp_path / "bad.tar"
    write_tar(path, GOOD[:2] + members + GOOD[2:])
    with pytest.raises(DataError, match=sentence):
        reader_of(path, PAIRS, 3).read(10)

    window = reader_of(path, PAIRS, 3, skip_bad=True).read(10)
    assert values(window) == [[[1], [2]], [[3], [4]]], "the others are read"
    assert window.indices.tolist() == [0, 2], "and keep their places"
    assert window.n_bad == 1
    with pytest.raises(DataError, match=sentence):
        raise DataError(window.problem)


def test_two_bad_sides_are_one_bad_sample(tmp_path: Path) -> None:
    write_tar(tmp_path / "bad.tar", [("0.source", b"abc"), ("0.target", b"abc"), *GOOD])
    window = reader_of(tmp_path / "bad.tar", PAIRS, 3, skip_bad=True).read(3)
    assert (window.indices.tolist(), window.n_bad) == ([1, 2], 1)


@pytest.mark.parametrize("cut", [0, 100, 512, 700, 3 * 1024, 3 * 1024 + 513])
def test_truncated_shards(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "train-00000.tar"
    write_shard(path, "text", U16, arrays(*range(1, 9)))
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(DataError, match=r"train-00000.tar (ends after|is damaged after sample) \d"):
        reader_of(path, TEXT, 8).read(8)

    reader = reader_of(path, TEXT, 8, skip_bad=True)
    first, second, after = reader.read(5), reader.read(5), reader.read(5)
    n_whole = sum(1024 * i + 512 + 2 * (i + 1) <= cut for i in range(8))
    assert first.indices.tolist() + second.indices.tolist() == list(range(n_whole))
    assert (len(first) + first.n_bad, len(second) + second.n_bad) == (5, 3), "the rest is lost and counted"
    assert (len(after), after.n_bad, reader.position) == (0, 0, 8)
    passed = reader_of(path, TEXT, 8, skip_bad=True)
    passed.skip(7)
    assert passed.read(1).n_bad == 1


def test_damage_in_the_middle_loses_the_rest(tmp_path: Path) -> None:
    path = tmp_path / "train-00000.tar"
    write_shard(path, "text", U16, arrays(*range(1, 9)))
    content = bytearray(path.read_bytes())
    content[3 * 1024 + 20] ^= 1
    path.write_bytes(content)
    with pytest.raises(
        DataError, match=r"damaged after sample 3 \(byte 3072 begins no tar header\): copy it"
    ):
        reader_of(path, TEXT, 8).read(8)
    window = reader_of(path, TEXT, 8, skip_bad=True).read(8)
    assert window.indices.tolist() == [0, 1, 2] and window.n_bad == 5


def test_no_file_is_only_lost_samples() -> None:
    reader = ShardReader("x.tar", None, TEXT, 7, skip_bad=True, problem="x.tar is unreachable")
    reader.skip(2)
    window = reader.read(100)
    assert (len(window), window.n_bad, window.problem) == (0, 5, "x.tar is unreachable")
    assert [lengths.tolist() for _, lengths in window.fields] == [[]]


class TestShardSet:
    @pytest.fixture
    def folder(self, tmp_path: Path, make_shards: MakeShards) -> Path:
        make_shards(tmp_path / "data", numbered_pairs(2, lambda _: 3), "pairs")
        return tmp_path / "data"

    def test_it_reads_every_sample_and_travels(self, folder: Path) -> None:
        data = DataConfig(train=str(folder))
        shards = pickle.loads(pickle.dumps(ShardSet.build(load_manifest(folder, data), "train", data)))
        assert len(shards) == 2 and shards.location(1) == str(folder / "train-00001.tar")
        assert [len(list(shards.samples(i))) for i in range(2)] == [3, 3]
        assert all(len(sample) == 2 for sample in shards.samples(0))

    def test_a_shard_that_cannot_be_opened(self, folder: Path) -> None:
        data = DataConfig(train=str(folder))
        manifest = load_manifest(folder)
        (folder / "train-00001.tar").unlink()
        with pytest.raises(DataError, match=r"train-00001.tar cannot be opened \(No such file"):
            ShardSet.build(manifest, "train", data).open(1)
        shards = ShardSet.build(manifest, "train", data.model_copy(update={"on_bad_shard": "skip"}))
        window = shards.open(1).read(2)
        assert (len(window), window.n_bad) == (0, 2) and "train-00001.tar cannot be opened" in window.problem

    @pytest.mark.parametrize("name", ["pipe:touch x", "| touch x"])
    def test_commands_are_refused(self, folder: Path, name: str) -> None:
        data = DataConfig(train=str(folder))
        manifest = load_manifest(folder)
        info = replace(manifest.train[0], base=name)
        shards = ShardSet.build(replace(manifest, train=(info,)), "train", data)
        with pytest.raises(DataError, match="pipes are not run"):
            shards.open(0)


class TestRawShards:
    @pytest.fixture
    def write(
        self, tmp_path: Path, tokenizer: TextTokenizer
    ) -> Callable[..., tuple[ShardInfo, SampleLayout]]:
        tokenizer.save(tmp_path / "tokenizer.json")

        def write(texts: list[tuple[str, ...]], kind: str) -> tuple[ShardInfo, SampleLayout]:
            samples = [tuple(np.frombuffer(t.encode(), np.uint8) for t in sample) for sample in texts]
            info = write_shard(tmp_path / "raw.tar", kind, RAW, samples, tokenizer)  # type: ignore[arg-type]
            layout = SampleLayout(
                kind,  # type: ignore[arg-type]
                U16,
                tokenizer.vocab_size,
                is_raw=True,
                tokenizer_path=tmp_path / "tokenizer.json",
            )
            return info, layout

        return write

    def test_text(self, tmp_path: Path, write: Any, tokenizer: TextTokenizer) -> None:
        texts = [*sentences(5), "zwölf\nBoxkämpfer \x00 🙂", ""]
        info, layout = write([(text,) for text in texts], "text")
        with tarfile.open(tmp_path / "raw.tar") as tar:
            assert tar.getnames()[:2] == ["000000000.txt", "000000001.txt"]
        window = reader_of(tmp_path / "raw.tar", layout, 7).read(7)
        assert [tokenizer.decode(tokens) for (tokens,) in values(window)] == texts
        assert info.n_source_tokens == int(window.fields[0][1].sum()) > 0
        assert window.fields[0][0].dtype == U16

    def test_pairs(self, tmp_path: Path, write: Any, tokenizer: TextTokenizer) -> None:
        texts = list(zip(sentences(5), sentences(5, seed=2), strict=True))
        info, layout = write(texts, "pairs")
        with tarfile.open(tmp_path / "raw.tar") as tar:
            assert tar.getnames()[:2] == ["000000000.source.txt", "000000000.target.txt"]
        reader = reader_of(tmp_path / "raw.tar", layout, 5)
        reader.skip(1)
        found = [tuple(tokenizer.decode(side) for side in sample) for sample in values(reader.read(9))]
        assert found == texts[1:]
        assert info.n_target_tokens == sum(len(tokenizer.encode(target)) for _, target in texts)

    def test_bytes_that_are_no_text(self, tmp_path: Path, write: Any) -> None:
        _, layout = write([("good",)], "text")
        write_tar(tmp_path / "bad.tar", [("0.txt", b"good"), ("1.txt", b"caf\xe9"), ("2.txt", b"too")])
        with pytest.raises(DataError, match=r"bad.tar, key 1: txt is not UTF-8 \(byte 3\)"):
            reader_of(tmp_path / "bad.tar", layout, 3).read(3)
        window = reader_of(tmp_path / "bad.tar", layout, 3, skip_bad=True).read(3)
        assert (window.indices.tolist(), window.n_bad) == ([0, 2], 1)


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

    def test_commands_and_chains_are_refused(self) -> None:
        with pytest.raises(DataError, match="pipes are not run"):
            load_manifest("pipe:cat shards")
        with pytest.raises(DataError, match="chains several file systems"):
            load_manifest("simplecache::https://example.org/shards")

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
