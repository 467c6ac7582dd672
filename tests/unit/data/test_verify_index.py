"""`data verify` finds every fault, and `data index` makes the tars of others trainable."""

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dist_transformer.config.data import DataConfig, RemoteConfig
from dist_transformer.data.index import index_tars
from dist_transformer.data.manifest import MARK_EVERY, load_manifest
from dist_transformer.data.shards import RAW, ShardSet, write_shard
from dist_transformer.data.stream import TrainStream
from dist_transformer.data.tokenizer import TextTokenizer
from dist_transformer.data.verify import ShardReport, n_bytes_of, verify
from dist_transformer.errors import DataError
from tests.unit.data.bad_server import serving
from tests.unit.data.conftest import MakeShards, numbered_pairs, sentences


def verify_all(folder: Path | str) -> list[ShardReport]:
    data = DataConfig(train=str(folder))
    done: list[int] = []
    reports = list(verify(str(folder), data, 1, done.append))
    assert sum(done) == n_bytes_of(str(folder), data)
    return sorted(reports, key=lambda report: report.info.file)


class TestVerify:
    @pytest.fixture
    def folder(self, tmp_path: Path, make_shards: MakeShards) -> Path:
        shards = numbered_pairs(3, lambda _: 20)
        make_shards(tmp_path / "data", shards[:2], "pairs", eval_shards=shards[2:])
        return tmp_path / "data"

    def test_a_good_folder(self, folder: Path) -> None:
        reports = verify_all(folder)
        assert [(r.split, r.problem, r.n_bad) for r in reports] == [("eval", "", 0)] + [("train", "", 0)] * 2

    @pytest.mark.parametrize(
        ("damage", "sentence", "n_bad"),
        [
            (lambda b: b[:-512], r"it has \d+ bytes, the manifest says \d+", 0),
            (lambda b: b[: 512 * 9], r"it has 4608 bytes, the manifest says \d+", 18),
            (lambda b: b"", "it has 0 bytes", 20),
            (lambda b: b[:512] + b"\xff\xff" + b[514:], "key 000000000: token 65535 is outside the vocab", 1),
            (
                lambda b: b[:512] + bytes([b[512] ^ 1]) + b[513:],
                "its sha256 is [0-9a-f]{64}, the manifest",
                0,
            ),
            (lambda b: b[:1024] + b"x" + b[1025:], r"is damaged after sample 0 \(byte 1024 begins no", 20),
        ],
    )
    def test_a_damaged_shard(
        self, folder: Path, damage: Callable[[bytes], bytes], sentence: str, n_bad: int
    ) -> None:
        path = folder / "train-00001.tar"
        path.write_bytes(damage(path.read_bytes()))
        reports = verify_all(folder)
        assert [r.info.file for r in reports if r.problem] == ["train-00001.tar"]
        with pytest.raises(DataError, match=rf"shard {path}.*{sentence}"):
            raise DataError(reports[2].problem)
        assert reports[2].n_bad == n_bad

    def test_a_missing_shard(self, folder: Path) -> None:
        (folder / "eval-00000.tar").unlink()
        report = verify_all(folder)[0]
        assert "eval-00000.tar cannot be opened (No such file" in report.problem and report.n_bad == 20

    @pytest.mark.parametrize(
        ("name", "sentence"),
        [
            ("n_samples", "it has 20 samples, the manifest says 19"),
            ("n_target_tokens", r"it has \d+ and \d+ tok"),
        ],
    )
    def test_counts_that_are_wrong(self, folder: Path, name: str, sentence: str) -> None:
        path = folder / "manifest.json"
        content = json.loads(path.read_text())
        content["splits"]["train"][0][name] -= 1
        path.write_text(json.dumps(content))
        with pytest.raises(DataError, match=sentence):
            raise DataError(verify_all(folder)[1].problem)

    def test_marks_that_are_wrong(self, tmp_path: Path, make_shards: MakeShards) -> None:
        make_shards(tmp_path / "data", [[(np.array([3]),)] * (MARK_EVERY + 1)])
        assert verify_all(tmp_path / "data")[0].problem == ""
        path = tmp_path / "data" / "manifest.json"
        content = json.loads(path.read_text())
        content["splits"]["train"][0]["marks"][0] -= 1024
        path.write_text(json.dumps(content))
        assert "begin elsewhere than the manifest says" in verify_all(tmp_path / "data")[0].problem

    def test_raw_shards(self, tmp_path: Path, tokenizer: TextTokenizer, make_shards: MakeShards) -> None:
        folder = make_raw(tmp_path / "raw", [sentences(7)], tokenizer)
        assert [r.problem for r in verify_all(folder)] == [""]


def make_raw(folder: Path, shards: list[list[str]], tokenizer: TextTokenizer) -> Path:
    """A prepared folder of raw text."""
    from dist_transformer.data.manifest import Manifest

    folder.mkdir()
    tokenizer.save(folder / "tokenizer.json")
    infos = []
    for i, texts in enumerate(shards):
        samples = [(np.frombuffer(text.encode(), np.uint8),) for text in texts]
        infos.append(write_shard(folder / f"train-{i:05d}.tar", "text", RAW, samples, tokenizer))
    Manifest(
        root=folder, kind="text", train=tuple(infos), eval=(), tokenizer_sha256=tokenizer.sha256,
        vocab_size=tokenizer.vocab_size, token_dtype="u16", samples="raw",
    ).save()  # fmt: skip
    return folder


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def batches(folder: Path | str, n: int, **options: object) -> list[list[list[int]]]:
    """Source tokens of the first batches of a run."""
    data = DataConfig(train=str(folder), max_source_len=64, max_target_len=14, workers=0, **options)  # type: ignore[arg-type]
    with TrainStream(data, seed=1, dp_rank=0, dp_size=1, micro_batch_size=4) as stream:
        iterator = iter(stream)
        return [next(iterator).encoder_input_tokens.tolist() for _ in range(n)]


def test_raw_and_tokenised_shards_train_alike(
    tmp_path: Path, tokenizer: TextTokenizer, make_shards: MakeShards
) -> None:
    texts = [sentences(30, seed) for seed in range(4)]
    make_shards(tmp_path / "tokens", [[(np.array(tokenizer.encode(t)),) for t in shard] for shard in texts])
    raw = make_raw(tmp_path / "raw", texts, tokenizer)
    assert batches(raw, 12) == batches(tmp_path / "tokens", 12)


class TestIndex:
    @pytest.fixture
    def tokenizer_file(self, tmp_path: Path, tokenizer: TextTokenizer) -> Path:
        tokenizer.save(tmp_path / "mine.json")
        return tmp_path / "mine.json"

    @pytest.fixture
    def tars(self, tmp_path: Path) -> Path:
        """Two tars of documents beside pictures, labels and pickles, in sub-folders."""
        folder = tmp_path / "tars"
        folder.mkdir()
        for i in range(2):
            members = []
            for j, text in enumerate(sentences(5, seed=i)):
                key = f"part/{i}-{j}"
                members += [
                    (f"{key}.jpg", os.urandom(1500)),
                    (f"{key}.txt", text.encode()),
                    (
                        f"{key}.json",
                        json.dumps({"text": text, "meta": {"title": f"{i} {j}"}, "n": j}).encode(),
                    ),
                    (f"{key}.pkl", b"never loaded"),
                ]
            write_tar(folder / f"c{i}.tar", [("readme.md", b"hello"), *members])
        return folder

    def texts(self, folder: Path, tokenizer: TextTokenizer) -> list[tuple[str, ...]]:
        shards = ShardSet.build(load_manifest(folder), "train", DataConfig(train=str(folder)))
        samples = (sample for i in range(len(shards)) for sample in shards.samples(i))
        return [tuple(tokenizer.decode(side) for side in sample) for sample in samples]

    @pytest.mark.parametrize("field", ["txt", "json:text"])
    def test_text(
        self, tmp_path: Path, tars: Path, tokenizer_file: Path, tokenizer: TextTokenizer, field: str
    ) -> None:
        summary = index_tars(
            [f"{tars}/c{{0..1}}.tar"], tmp_path / "out", fields=(field,), tokenizer=tokenizer_file
        )
        expected = sentences(5, seed=0) + sentences(5, seed=1)
        assert self.texts(tmp_path / "out", tokenizer) == [(text,) for text in expected]
        assert summary.n_bad == 0 and [s.n_samples for s in summary.manifest.train] == [5, 5]
        counted = sum(s.n_source_tokens for s in summary.manifest.train)
        assert counted == sum(len(tokenizer.encode(text)) for text in expected)
        assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["manifest.json", "tokenizer.json"]
        assert [r.problem for r in verify_all(tmp_path / "out")] == ["", ""]
        assert len(batches(tmp_path / "out", 5)) == 5

    def test_pairs_of_one_member_and_a_held_out_tar(
        self, tmp_path: Path, tars: Path, tokenizer_file: Path, tokenizer: TextTokenizer
    ) -> None:
        summary = index_tars(
            [str(tars / "c0.tar")], tmp_path / "out", fields=("json:meta.title", "json:text"),
            tokenizer=tokenizer_file, eval_tars=[str(tars / "c1.tar")],
        )  # fmt: skip
        assert summary.manifest.kind == "pairs"
        texts = sentences(5, seed=0)
        assert self.texts(tmp_path / "out", tokenizer) == [(f"0 {j}", text) for j, text in enumerate(texts)]
        loaded = load_manifest(tmp_path / "out")
        assert [s.location for s in loaded.eval] == [str(tars / "c1.tar")]

    def test_urls(self, tmp_path: Path, tars: Path, tokenizer_file: Path, tokenizer: TextTokenizer) -> None:
        remote = RemoteConfig(cache_dir=str(tmp_path / "cache"), backoff_s=0.01)
        with serving(tars) as server:
            server.faults["c0.tar"] = [503]
            pattern = server.url + "/c{0,1}.tar"
            index_tars([pattern], tmp_path / "out", fields=("txt",), tokenizer=tokenizer_file, remote=remote)
            data = DataConfig(train=str(tmp_path / "out"), remote=remote)
            shards = ShardSet.build(load_manifest(tmp_path / "out", data), "train", data)
            assert shards.location(1) == f"{server.url}/c1.tar"
            assert sum(1 for i in range(2) for _ in shards.samples(i)) == 10
            assert [server.count(f"c{i}.tar") for i in range(2)] == [2, 1], "what was indexed is kept"
        digest = hashlib.sha256((tars / "c0.tar").read_bytes()).hexdigest()
        assert (tmp_path / "cache" / digest).exists()

    def test_samples_that_lack_a_member(self, tmp_path: Path, tokenizer_file: Path) -> None:
        members = [("0.en.txt", b"a b"), ("0.de.txt", b"c d"), ("1.en.txt", b"e f"), ("2.de.txt", b"g h")]
        write_tar(tmp_path / "x.tar", members)
        summary = index_tars(
            [str(tmp_path / "x.tar")], tmp_path / "out", fields=("en.txt", "de.txt"), tokenizer=tokenizer_file
        )
        assert (summary.n_bad, summary.manifest.train[0].n_samples) == (2, 3)
        data = DataConfig(train=str(tmp_path / "out"), on_bad_shard="skip")
        window = ShardSet.build(load_manifest(tmp_path / "out"), "train", data).open(0).read(9)
        assert (window.indices.tolist(), window.n_bad) == ([0], 2)
        (report,) = verify_all(tmp_path / "out")
        assert report.n_bad == 2 and "key 1: 1.de.txt is missing" in report.problem

    @pytest.mark.parametrize(
        ("content", "sentence"),
        [
            (b"{", r"key 0: json is not JSON"),
            (b'{"text": 3}', r"key 0: json is no JSON object with a text 'text'"),
            (b'["text"]', r"key 0: json is no JSON object with a text 'text'"),
            (b"[" * 100_000, r"key 0: json is not JSON"),
            (b"\xff", r"key 0: json is not UTF-8"),
        ],
    )
    def test_json_that_holds_no_text(
        self, tmp_path: Path, tokenizer_file: Path, content: bytes, sentence: str
    ) -> None:
        write_tar(tmp_path / "x.tar", [("0.json", content), ("1.json", b'{"text": "good"}')])
        index_tars(
            [str(tmp_path / "x.tar")], tmp_path / "out", fields=("json:text",), tokenizer=tokenizer_file
        )
        (report,) = verify_all(tmp_path / "out")
        assert report.n_bad == 1
        with pytest.raises(DataError, match=sentence):
            raise DataError(report.problem)

    def test_long_tars_are_estimated_and_marked(
        self, tmp_path: Path, tokenizer_file: Path, tokenizer: TextTokenizer
    ) -> None:
        texts = sentences(2 * MARK_EVERY + 10)
        write_tar(tmp_path / "x.tar", [(f"{i}.txt", text.encode()) for i, text in enumerate(texts)])
        summary = index_tars(
            [str(tmp_path / "x.tar")], tmp_path / "out", fields=("txt",), tokenizer=tokenizer_file
        )
        (info,) = summary.manifest.train
        exact = sum(map(len, tokenizer.encode_batch(texts)))
        assert abs(info.n_source_tokens - exact) < 0.03 * exact
        assert len(info.marks) == 2
        assert [report.problem for report in verify_all(tmp_path / "out")] == [""]

    @pytest.mark.parametrize(
        ("options", "sentence"),
        [
            ({"fields": ("jpeg",)}, r"c0.tar has no member KEY.jpeg: see --field"),
            ({"fields": ("pkl",)}, "pickles are never loaded"),
            ({"fields": ("txt:text",)}, "field 'txt:text': give a member's name"),
            ({"fields": ("txt", "txt")}, "source and target are both 'txt'"),
            ({"tars": ["{c0,nowhere}.tar"]}, r"nowhere.tar cannot be opened \(No such file"),
            ({"tars": ["c0.tar", "c{0,1}.tar"]}, "a tar is named twice"),
            ({"tars": ["pipe:cat c0.tar"]}, "pipes are not run"),
            ({"eval_tars": ["c0.tar"]}, r"c0.tar is given for training and for evaluation"),
            ({"out": "."}, r"holds other things \(c0.tar\)"),
        ],
    )
    def test_what_is_refused(
        self, tars: Path, tokenizer_file: Path, monkeypatch: pytest.MonkeyPatch, options: dict, sentence: str
    ) -> None:
        monkeypatch.chdir(tars)
        arguments = {"tars": ["c0.tar"], "out": "out", "fields": ("txt",)} | options
        with pytest.raises(DataError, match=sentence):
            index_tars(
                arguments.pop("tars"), Path(arguments.pop("out")), tokenizer=tokenizer_file, **arguments
            )
        assert not Path("out").exists()

    def test_damaged_tars(self, tmp_path: Path, tars: Path, tokenizer_file: Path) -> None:
        path = tars / "c0.tar"
        content = path.read_bytes()
        for bad, sentence in (
            (
                content[:4196],
                r"c0.tar is damaged after sample 1 \(it ends at byte 4196, inside a header\): mend",
            ),
            (content[: 512 * 22], "it is truncated"),
            (b"\x1f\x8b" + content, "it is compressed: decompress it"),
        ):
            path.write_bytes(bad)
            with pytest.raises(DataError, match=sentence):
                index_tars([str(path)], tmp_path / "out", fields=("txt",), tokenizer=tokenizer_file)

    def test_an_existing_manifest_is_kept(self, tmp_path: Path, tars: Path, tokenizer_file: Path) -> None:
        def index(overwrite: bool) -> None:
            index_tars(
                [str(tars / "c0.tar")], tmp_path / "out", fields=("txt",), tokenizer=tokenizer_file,
                overwrite=overwrite,
            )  # fmt: skip

        index(False)
        with pytest.raises(DataError, match="has a manifest already: give another --out, or --overwrite"):
            index(False)
        index(True)
