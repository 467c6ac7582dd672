"""Preparation: complete, shuffled, continued after a kill, and refused in one sentence when it should be."""

import gzip
import os
import subprocess
import sys
import textwrap
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from dist_transformer.data import documents, preparation
from dist_transformer.data.documents import scan
from dist_transformer.data.inputs import Input, Reading
from dist_transformer.data.manifest import load_manifest
from dist_transformer.data.prepare import prepare_pairs, prepare_text
from dist_transformer.data.shares import default_shards
from dist_transformer.data.spill import Part
from dist_transformer.errors import DataError
from tests.unit.data.conftest import sentences
from tests.unit.data.prepared import OPTIONS, content_of, texts_of, write_pairs


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "in.txt"
    path.write_text("\n".join(f"{i} {line}" for i, line in enumerate(sentences(500))) + "\n")
    return path


def test_every_document_once(text_file: Path, tmp_path: Path) -> None:
    summary = prepare_text([text_file], tmp_path / "out", held_out=20, **OPTIONS)
    manifest = load_manifest(tmp_path / "out")
    train, held = texts_of(manifest, "train"), texts_of(manifest, "eval")
    lines = text_file.read_text().splitlines()
    assert Counter(text for (text,) in train + held) == Counter(lines)
    assert (len(held), summary.n_samples, summary.n_eval_samples, summary.n_shards) == (20, 480, 20, 24)
    assert {shard.n_samples for shard in manifest.train} == {20}
    assert [text for (text,) in train] != lines[:480], "shuffled"
    assert {path.name for path in (tmp_path / "out").iterdir() if path.suffix != ".tar"} == {
        "manifest.json",
        "prepare.json",
        "tokenizer.json",
    }
    again = prepare_text([text_file], tmp_path / "again", held_out=20, vocab_size=500, workers=2)
    assert again.n_samples == 480
    assert content_of(tmp_path / "again") == content_of(tmp_path / "out")
    prepare_text([text_file], tmp_path / "other", held_out=20, seed=2, **OPTIONS)
    assert set(texts_of(load_manifest(tmp_path / "other"), "eval")) != set(held)


def test_units_line_ends_and_empty_documents(tmp_path: Path) -> None:
    path = tmp_path / "in.txt"
    path.write_bytes("\ufeffone\r\n  two \r\n\r\n \t\nthree\n\nfour".encode())
    expected = {
        "line": (["one", "  two ", "three", "four"], 3),
        "paragraph": (["one\n  two ", "three", "four"], 0),
        "file": (["one\n  two \n\n \t\nthree\n\nfour"], 0),
    }
    for unit, (found, n_empty) in expected.items():
        summary = prepare_text([path], tmp_path / unit, documents=unit, held_out=0, **OPTIONS)  # type: ignore[arg-type]
        assert sorted(t for (t,) in texts_of(load_manifest(tmp_path / unit), "train")) == sorted(found)
        assert (summary.counts["n_empty"], summary.n_shards, summary.n_eval_samples) == (n_empty, 1, 0)


def test_long_documents_become_consecutive_samples(tmp_path: Path) -> None:
    path = tmp_path / "in.txt"
    path.write_text("\n".join(sentences(40)) + "\n" + " ".join(sentences(60)) + "\n")
    summary = prepare_text(
        [path], tmp_path / "out", held_out=0, max_document_tokens=50, n_shards=1, **OPTIONS
    )
    assert summary.counts["n_split"] == 1
    samples = "".join(text for (text,) in texts_of(load_manifest(tmp_path / "out"), "train"))
    assert " ".join(sentences(60)) in samples


def test_compressed_files_give_the_same(text_file: Path, tmp_path: Path) -> None:
    packed = tmp_path / "in.txt.gz"
    packed.write_bytes(gzip.compress(text_file.read_bytes()))
    prepare_text([text_file], tmp_path / "plain", **OPTIONS)
    prepare_text([packed], tmp_path / "packed", **OPTIONS)
    plain, other = load_manifest(tmp_path / "plain"), load_manifest(tmp_path / "packed")
    assert plain.fingerprint() == other.fingerprint()
    packed.write_bytes(packed.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"in.txt.gz is a damaged gzip file"):
        prepare_text([packed], tmp_path / "damaged", **OPTIONS)


def test_pairs_stay_together(tmp_path: Path) -> None:
    source, target = write_pairs(tmp_path)
    with source.open("a") as s, target.open("a") as t:
        s.write("\nnot empty\n")
        t.write("not empty\n  \n")
    summary = prepare_pairs([(source, target)], tmp_path / "out", **OPTIONS)
    assert (summary.counts["n_empty"], summary.n_samples, summary.n_eval_samples) == (2, 297, 3)
    manifest = load_manifest(tmp_path / "out")
    found = texts_of(manifest, "train") + texts_of(manifest, "eval")
    pairs = zip(source.read_text().split("\n"), target.read_text().split("\n"), strict=True)
    assert sorted(found) == sorted(list(pairs)[:300])


def test_held_out_files_and_a_given_tokenizer(tmp_path: Path) -> None:
    source, target = write_pairs(tmp_path)
    (tmp_path / "held").mkdir()
    held = write_pairs(tmp_path / "held", 30)
    prepare_pairs([(source, target)], tmp_path / "one", **OPTIONS)
    prepare_pairs(
        [(source, target)], tmp_path / "two", eval_files=[held],
        tokenizer=tmp_path / "one" / "tokenizer.json", workers=1,
    )  # fmt: skip
    manifest = load_manifest(tmp_path / "two")
    assert [f"{s}\n" for s, _ in texts_of(manifest, "eval")] == held[0].read_text().splitlines(keepends=True)
    assert manifest.tokenizer_sha256 == load_manifest(tmp_path / "one").tokenizer_sha256
    assert sum(shard.n_samples for shard in manifest.train) == 300


def test_inputs_that_are_refused_before_anything_is_written(text_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    source, target = write_pairs(tmp_path, 30)
    with target.open("a") as file:
        file.write("one more\nand another\n")
    with pytest.raises(DataError, match=r"a.en has 30 lines but .*a.de has 32: line i of one"):
        prepare_pairs([(source, target)], out, **OPTIONS)
    with pytest.raises(DataError, match=r"a.de has 32 lines but .*a.en has 30"):
        prepare_pairs([(target, source)], out, **OPTIONS)
    with pytest.raises(DataError, match="was given twice"):
        prepare_text([text_file, text_file.parent / "." / text_file.name], out, **OPTIONS)
    with pytest.raises(DataError, match="was given twice"):
        prepare_pairs([(source, source)], out, **OPTIONS)
    with pytest.raises(DataError, match=r"nothing.txt does not exist"):
        prepare_text([tmp_path / "nothing.txt"], out, **OPTIONS)
    with pytest.raises(DataError, match="is a folder"):
        prepare_text([tmp_path], out, **OPTIONS)
    with pytest.raises(DataError, match="no input files"):
        prepare_text([], out, **OPTIONS)
    blank = tmp_path / "blank.txt"
    blank.write_text(" \n\n")
    with pytest.raises(DataError, match=r"there is no text in .*blank.txt"):
        prepare_text([blank], out, **OPTIONS)
    with pytest.raises(DataError, match="held_out=500 leaves nothing to train on: there are 500 documents"):
        prepare_text([text_file], out, held_out=500, **OPTIONS)
    with pytest.raises(DataError, match="600 shards are more than the 495 training documents"):
        prepare_text([text_file], out, n_shards=600, **OPTIONS)
    with pytest.raises(DataError, match="exclude each other"):
        prepare_text([text_file], out, eval_files=[source], held_out=5, **OPTIONS)
    assert not out.exists()


@pytest.mark.parametrize("unit", ["line", "paragraph", "file"])
def test_bad_utf8_is_named_with_its_place(tmp_path: Path, unit: Any) -> None:
    path = tmp_path / "in.txt"
    path.write_bytes(b"good\nfine too\nbad \xfc here\nend\n")
    with pytest.raises(DataError, match=r"in.txt, line 3, byte 18: not UTF-8 \(byte 0xfc\)"):
        prepare_text([path], tmp_path / "out", documents=unit, **OPTIONS)
    prepare_text([path], tmp_path / "out", documents=unit, bad_utf8="replace", held_out=0, **OPTIONS)
    assert any("bad \ufffd here" in text for (text,) in texts_of(load_manifest(tmp_path / "out"), "train"))


def test_folders_that_are_refused(text_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.doc").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(DataError, match=r"out holds other things \(thesis.doc\)"):
            prepare_text([text_file], out, overwrite=overwrite, **OPTIONS)
    (out / "thesis.doc").unlink()
    prepare_text([text_file], out, **OPTIONS)
    before = content_of(out)
    with pytest.raises(DataError, match="is already prepared: use another --out or --overwrite"):
        prepare_text([text_file], out, **OPTIONS)
    assert content_of(out) == before
    (out / "notes.txt").write_text("mine")
    prepare_text([text_file], out, overwrite=True, n_shards=2, **OPTIONS)
    assert len(load_manifest(out).train) == 2
    assert (out / "notes.txt").exists() and not (out / "train-00002.tar").exists()
    (out / "manifest.json").unlink()
    with pytest.raises(
        DataError, match=r"begun with other arguments: n_shards=2 \(now None\): run that command again"
    ):
        prepare_text([text_file], out, **OPTIONS)
    with text_file.open("a") as file:
        file.write("more\n")
    with pytest.raises(DataError, match="begun with other input files"):
        prepare_text([text_file], out, n_shards=2, **OPTIONS)
    with pytest.raises(DataError, match="is a file"):
        prepare_text([text_file], text_file, **OPTIONS)


def test_a_tokenizer_whose_ids_batches_cannot_use(text_file: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models

    path = tmp_path / "theirs.json"
    Tokenizer(models.WordLevel({"</s>": 0, "<pad>": 1, "<unk>": 2}, unk_token="<unk>")).save(str(path))
    with pytest.raises(DataError, match="padding=1 and end-of-sequence=0: batches need ids 0 and 1"):
        prepare_text([text_file], tmp_path / "out", tokenizer=path)


def test_compressed_files_are_read_by_different_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each from its beginning to its end by one, but never two files by the same for no reason."""
    monkeypatch.setattr(documents, "SEGMENT_BYTES", 1000)
    monkeypatch.setattr(preparation, "_MIN_PART_BYTES", 2500)
    segments = []
    for i, n_lines in enumerate((700, 3, 3, 700, 700)):
        path = tmp_path / f"{i}.txt.gz"
        path.write_bytes(gzip.compress(b"".join(b"%09d\n" % n for n in range(n_lines))))
        segments += scan(Input((str(path),), Reading("line", "error", "error", ("text",)))).segments
    cut = preparation._cut(segments)
    assert [segment for some in cut for segment in some] == segments
    parts = [Part(tmp_path, "train", i, tuple(some), 100) for i, some in enumerate(cut)]
    files = [
        {s.input.files[0][-8] for part in group for s in part.segments} for group in preparation._group(parts)
    ]
    assert files == [{"0"}, {"1", "2", "3"}, {"4"}]
    assert len(parts) > 5


def test_default_shards() -> None:
    assert default_shards(1000, 7, 7) == 1
    assert default_shards(1000, 100, 100) == 12
    assert default_shards(1000, 10_000, 10_000) == 24
    assert default_shards(1000, 50_000, 50_000) == 60
    assert default_shards(1000, 500_000, 500_000) == 96
    assert default_shards(20 << 20, 52, 5_000) == 24
    assert default_shards(10 << 30, 10**7, 10**7) == 180
    assert default_shards(1 << 50, 10**9, 10**9) == 30720


def test_processes_end_with_a_killed_parent(tmp_path: Path) -> None:
    script = tmp_path / "main.py"
    script.write_text(
        textwrap.dedent("""
        import os, time
        from dist_transformer.data.pool import Workers
        def task(seconds):
            os.write(1, b"%d\\n" % os.getpid())  # in one piece: an unbuffered print writes the line's end apart
            time.sleep(seconds)
        if __name__ == "__main__":
            with Workers(2) as workers:
                list(workers.run(task, [60, 60]))
        """)
    )
    process = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    pids = [int(process.stdout.readline()) for _ in range(2)]
    process.kill()
    process.wait()
    deadline = time.monotonic() + 10
    while any(_is_alive(pid) for pid in pids):
        assert time.monotonic() < deadline, "workers outlived their parent"
        time.sleep(0.1)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (ProcessLookupError, FileNotFoundError):
        return False
