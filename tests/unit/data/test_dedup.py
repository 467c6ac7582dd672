"""Exact duplicates: the first is kept, each one left out is counted, and none that is held out is trained on."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_transformer.data import dedup, documents, preparation
from dist_transformer.data.dedup import find_duplicates
from dist_transformer.data.documents import scan
from dist_transformer.data.inputs import Input, Reading
from dist_transformer.data.manifest import load_manifest
from dist_transformer.data.pool import Workers
from dist_transformer.data.prepare import prepare_pairs, prepare_text
from dist_transformer.errors import DataError
from tests.unit.data.prepared import OPTIONS, content_of, numbered_lines, texts_of

READING = Reading("line", "error", "error", ("text",))


@settings(max_examples=25, deadline=None)
@given(
    lines=st.lists(st.integers(0, 30).map(str), min_size=1, max_size=80),
    n_parts=st.integers(1, 6),
    bucket=st.integers(1, 20),
)
def test_all_but_the_first(
    tmp_path_factory: pytest.TempPathFactory, lines: list[str], n_parts: int, bucket: int
) -> None:
    folder = tmp_path_factory.mktemp("dedup")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dedup, "BUCKET_DOCUMENTS", bucket)
        parts, expected = [], []
        seen: set[str] = set()
        for i, some in enumerate(np.array_split(np.array(lines), n_parts)):
            (folder / f"{i}.txt").write_text("".join(f"{line}\n" for line in some))
            parts.append((scan(Input((str(folder / f"{i}.txt"),), READING)).segments,))
            expected.append(
                [place for place, line in enumerate(some) if line in seen or line in some[:place]]
            )
            seen.update(some)
        found, counts = find_duplicates(folder / "found", parts, Workers(1))
    assert found.n_buckets == -(-len(lines) // bucket)
    assert [found.of_part(i).tolist() for i in range(n_parts)] == expected
    assert counts == list(map(len, expected))


def test_the_same_for_any_number_of_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preparation, "_PARALLEL_BYTES", 0)
    monkeypatch.setattr(preparation, "_MIN_PART_BYTES", 1 << 14)
    monkeypatch.setattr(documents, "SEGMENT_BYTES", 1 << 13)
    lines = numbered_lines(1200)
    (tmp_path / "a.txt").write_text("\n".join(lines + lines[100:150]) + "\n")
    (tmp_path / "b.txt").write_text("\n".join(lines[1000:] + ["other"]) + "\n")
    files = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for workers in (1, 2):
        summary = prepare_text(files, tmp_path / str(workers), dedup=True, vocab_size=500, workers=workers)
        assert (summary.counts["n_duplicates"], summary.n_samples + summary.n_eval_samples) == (250, 1201)
    assert content_of(tmp_path / "1") == content_of(tmp_path / "2")
    found = texts_of(tmp_path / "1") + texts_of(tmp_path / "1", "eval")
    assert sorted(found) == sorted((line,) for line in [*lines, "other"])
    # Without duplicates, it is as if it had not been asked for.
    once = tmp_path / "once.txt"
    once.write_text("\n".join([*lines, "other"]) + "\n")
    prepare_text([once], tmp_path / "plain", **OPTIONS)
    assert load_manifest(tmp_path / "plain").fingerprint() == load_manifest(tmp_path / "1").fingerprint()


def test_what_is_held_out_is_not_trained_on(tmp_path: Path) -> None:
    lines = numbered_lines(300)
    path = tmp_path / "in.txt"
    path.write_text("\n".join(lines * 3) + "\n")
    prepare_text([path], tmp_path / "out", dedup=True, held_out=60, **OPTIONS)
    held, train = set(texts_of(tmp_path / "out", "eval")), set(texts_of(tmp_path / "out"))
    assert (len(held), len(train), held & train) == (60, 240, set())
    prepare_text([path], tmp_path / "double", held_out=60, **OPTIONS)
    assert set(texts_of(tmp_path / "double", "eval")) & set(texts_of(tmp_path / "double"))

    other = tmp_path / "held.txt"
    other.write_text("\n".join([*lines[:20], "new", "new", *lines[:20]]) + "\n")
    summary = prepare_text([path], tmp_path / "files", dedup=True, eval_files=[other], **OPTIONS)
    held, train = set(texts_of(tmp_path / "files", "eval")), set(texts_of(tmp_path / "files"))
    assert held == {(line,) for line in [*lines[:20], "new"]}
    assert train == {(line,) for line in lines[20:]}
    assert (summary.n_samples, summary.n_eval_samples) == (280, 21)
    assert summary.counts["n_duplicates"] == 600 + 20 + 21


def test_pairs_are_equal_where_both_sides_are(tmp_path: Path) -> None:
    rows = [("a", "b"), ("a", "c"), ("d", "b"), ("ab", ""), ("a", "b"), ("", "ab"), ("ab", "c"), ("a", "bc")]
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps({"source": s, "target": t}) + "\n" for s, t in rows))
    summary = prepare_pairs([path], tmp_path / "out", dedup=True, held_out=0, **OPTIONS)
    assert (summary.counts["n_duplicates"], summary.counts["n_empty"]) == (1, 2)
    assert sorted(texts_of(tmp_path / "out")) == sorted({pair for pair in rows if all(pair)})


@pytest.mark.parametrize("bad", [{"held_out": 3}, {"n_shards": 3}])
def test_too_few_are_left(tmp_path: Path, bad: dict[str, Any]) -> None:
    path = tmp_path / "in.txt"
    path.write_text("a\nb\n" * 10)
    with pytest.raises(DataError, match=r"there are 2 documents|more than the 1 training documents"):
        prepare_text([path], tmp_path / "out", dedup=True, **bad, **OPTIONS)
