"""Work shared by several tasks: every document once, one folder in the end, and no quiet mistake on the way."""

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_transformer.data.array import merge
from dist_transformer.data.inputs import Input, Reading
from dist_transformer.data.manifest import load_manifest
from dist_transformer.data.prepare import PreparedSummary, prepare_pairs, prepare_text
from dist_transformer.data.shares import Share, default_array_shards, share_inputs
from dist_transformer.errors import DataError
from tests.unit.data.prepared import content_of, numbered_lines, texts_of

N_TASKS = 3


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five files of different sizes, and a tokenizer."""
    folder = tmp_path_factory.mktemp("corpus")
    lines = numbered_lines(700)
    for i, (first, end) in enumerate([(0, 50), (50, 200), (200, 500), (500, 620), (620, 700)]):
        content = ("\n".join(lines[first:end]) + "\n").encode()
        name = folder / f"{i}.txt{'.gz' if i == 2 else ''}"
        name.write_bytes(gzip.compress(content) if i == 2 else content)
    prepare_text([folder / "0.txt"], folder / "small", vocab_size=500, workers=1, held_out=0)
    (folder / "small" / "tokenizer.json").rename(folder / "tokenizer.json")
    return folder


def run_task(corpus: Path, out: Path, task: int, n_tasks: int = N_TASKS, **options: Any) -> PreparedSummary:
    files = sorted(corpus.glob("?.txt*"))
    fixed = {"tokenizer": corpus / "tokenizer.json", "workers": 1, "n_shards": 6} | options
    return prepare_text(files, out, task=task, n_tasks=n_tasks, **fixed)


def test_tasks_and_merge(corpus: Path, tmp_path: Path) -> None:
    options = {"n_shards": 8, "held_out": 31}
    for task in (2, 0, 1):
        run_task(corpus, tmp_path / "out", task, **options)
        with pytest.raises(DataError, match=r"its parts are not merged yet: .* prepare merge"):
            load_manifest(tmp_path / "out")
    parts = [load_manifest(tmp_path / "out" / "parts" / f"{task:05d}") for task in range(N_TASKS)]
    assert [(len(part.train), sum(s.n_samples for s in part.eval)) for part in parts] == [
        (2, 10),
        (3, 10),
        (3, 11),
    ]
    files = {p: p.stat().st_ino for p in (tmp_path / "out" / "parts").rglob("*.tar")}
    summary = merge(tmp_path / "out")
    assert (summary.n_shards, summary.n_samples, summary.n_eval_samples) == (8, 669, 31)
    assert {p.stat().st_ino for p in (tmp_path / "out").glob("*.tar")} == set(files.values()), (
        "renamed, not copied"
    )
    assert {p.name for p in (tmp_path / "out").iterdir() if p.suffix != ".tar"} == {
        "manifest.json", "prepare.json", "tokenizer.json",
    }  # fmt: skip
    merged = load_manifest(tmp_path / "out")
    assert [s.file for s in merged.train] == [f"train-{i:05d}.tar" for i in range(8)]
    assert [s.sha256 for s in merged.train] == [s.sha256 for part in parts for s in part.train]
    found = texts_of(merged) + texts_of(merged, "eval")
    assert Counter(found) == Counter((line,) for line in numbered_lines(700))
    before = content_of(tmp_path / "out")
    assert merge(tmp_path / "out").n_samples == 669
    assert content_of(tmp_path / "out") == before
    with pytest.raises(DataError, match=r"out is already prepared: use another --out, or remove it"):
        run_task(corpus, tmp_path / "out", 1, **options)


def test_counts_add_up_and_held_out_files_are_written_once(corpus: Path, tmp_path: Path) -> None:
    held = tmp_path / "held.txt"
    held.write_text("\n".join([*numbered_lines(40), "", "held alone"]) + "\n")
    for task in range(N_TASKS):
        run_task(corpus, tmp_path / "out", task, eval_files=[held], dedup=True, n_shards=None)
    summary = merge(tmp_path / "out")
    assert (summary.n_samples, summary.n_eval_samples) == (660, 41)
    assert summary.counts == {"n_empty": 1, "n_bad_lines": 0, "n_duplicates": 40, "n_split": 0}
    assert not set(texts_of(tmp_path / "out")) & set(texts_of(tmp_path / "out", "eval"))


def test_pairs_and_raw(corpus: Path, tmp_path: Path) -> None:
    rows = [(f"source {i}", f"target {i}") for i in range(90)]
    for i in range(3):
        lines = [json.dumps({"source": s, "target": t}) for s, t in rows[30 * i : 30 * i + 30]]
        (tmp_path / f"{i}.jsonl").write_text("\n".join(lines) + "\n")
    files = sorted(tmp_path.glob("*.jsonl"))
    for task in range(2):
        prepare_pairs(
            files,
            tmp_path / "out",
            tokenizer=corpus / "tokenizer.json",
            workers=1,
            raw=True,
            task=task,
            n_tasks=2,
        )
    merge(tmp_path / "out")
    assert sorted(texts_of(tmp_path / "out") + texts_of(tmp_path / "out", "eval")) == sorted(rows)


def test_a_finished_task_has_nothing_to_do(corpus: Path, tmp_path: Path) -> None:
    """Slurm may start one again; its exit code must not fail the merge that waits for it."""
    first = run_task(corpus, tmp_path / "out", 1)
    part = tmp_path / "out" / "parts" / "00001"
    before = {p: p.stat().st_mtime_ns for p in part.iterdir()}
    again = run_task(corpus, tmp_path / "out", 1)
    assert (again.n_samples, again.counts) == (first.n_samples, first.counts)
    assert {p: p.stat().st_mtime_ns for p in part.iterdir()} == before


def test_missing_tasks_are_named(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(DataError, match=r"out holds no parts to merge"):
        merge(out)
    run_task(corpus, out, 3, n_tasks=5)
    with pytest.raises(
        DataError, match=r"tasks 0-2, 4 of the 5 tasks of .*out .*sbatch --array=0-2,4 with --tasks 5"
    ):
        merge(out)
    for task in (0, 1, 2, 4):
        run_task(corpus, out, task, n_tasks=5)
    (out / "parts" / "00002" / "manifest.json").unlink()
    with pytest.raises(DataError, match=r"task 2 of the 5 tasks of .*out .*did not finish: run it again"):
        merge(out)
    run_task(corpus, out, 2, n_tasks=5)
    assert merge(out).n_samples + merge(out).n_eval_samples == 700


def test_arrays_do_not_mix(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run_task(corpus, out, 0)
    # Part of an array that is run again alone: Slurm counts one task.
    with pytest.raises(DataError, match=r"task 2 of 1: tasks are counted from 0; .*--tasks with the number"):
        run_task(corpus, out, 2, n_tasks=1)
    with pytest.raises(
        DataError, match=r"out was begun with other arguments: tasks=3 \(now 4\): run the array"
    ):
        run_task(corpus, out, 1, n_tasks=4)
    with pytest.raises(DataError, match=r"other arguments: seed=1 \(now 2\)"):
        run_task(corpus, out, 1, seed=2)
    (tmp_path / "more.txt").write_text("more\n")
    with pytest.raises(DataError, match="out was begun with other input files"):
        prepare_text(
            [*sorted(corpus.glob("?.txt*")), tmp_path / "more.txt"], out, tokenizer=corpus / "tokenizer.json",
            workers=1, n_shards=6, task=1, n_tasks=N_TASKS,
        )  # fmt: skip
    description = out / "parts" / "00000" / "prepare.json"
    for task in (1, 2):
        run_task(corpus, out, task)
    description.write_text(description.read_text().replace('"seed": 1', '"seed": 7'))
    with pytest.raises(
        DataError, match=r"task 0 of .*out was begun with other arguments: seed=7 \(now 1\): remove"
    ):
        merge(out)


def test_arguments_that_no_array_can_have(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for options, sentence in (
        ({"tokenizer": None}, "need one --tokenizer FILE for all of them: .* prepare tokenizer FILES"),
        ({"dedup": True}, "with --dedup, give --held-out 0 or held-out files"),
        ({"n_shards": 2}, "2 shards are fewer than the 3 tasks"),
        ({"n_tasks": 6, "task": 0}, "6 tasks are more than the 5 inputs: use 5 tasks or fewer"),
        ({"n_tasks": None}, "belong together"),
    ):
        with pytest.raises(DataError, match=sentence):
            run_task(corpus, out, **{"task": 1, "n_tasks": N_TASKS, **options})
    assert not out.exists()
    out.mkdir()
    (out / "thesis.doc").write_text("mine")
    with pytest.raises(DataError, match=r"out holds other things \(thesis.doc\)"):
        run_task(corpus, out, 0)
    assert content_of(out) == {"thesis.doc": b"mine"}
    with pytest.raises(DataError, match="is a file"):
        run_task(corpus, out / "thesis.doc", 0)


@settings(max_examples=30, deadline=None)
@given(sizes=st.lists(st.integers(0, 1000), min_size=1, max_size=30), n_tasks=st.integers(1, 8))
def test_shares_are_even(sizes: list[int], n_tasks: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("shares")
    inputs = []
    for i, size in enumerate(sizes):
        (folder / f"{i}.txt").write_bytes(b"x" * size)
        inputs.append(Input((str(folder / f"{i}.txt"),), Reading("line", "error", "error", ("text",))))
    n_tasks = min(n_tasks, len(inputs))
    dealt = [share_inputs(inputs, [], task, n_tasks) for task in range(n_tasks)]
    assert len({(share.inputs, share.n_shards) for share, _ in dealt}) == 1
    own = [[inputs.index(source) for source in some] for _, some in dealt]
    assert sorted(i for some in own for i in some) == list(range(len(inputs)))
    assert all(some and some == sorted(some) for some in own)
    loads = [sum(sizes[i] for i in some) for some in own]
    assert max(loads) - min(loads) <= max(sizes)


@settings(deadline=None)
@given(total=st.integers(0, 10_000), n_tasks=st.integers(1, 50))
def test_shares_of_a_number(total: int, n_tasks: int) -> None:
    shares = [Share(task, n_tasks).of(total) for task in range(n_tasks)]
    assert sum(shares) == total
    assert max(shares) - min(shares) <= 1


def test_default_shards_of_an_array() -> None:
    assert default_array_shards(1 << 20, 3) == 96
    assert default_array_shards(1 << 20, 100) == 120
    assert default_array_shards(1 << 40, 100) == 15360
    assert default_array_shards(1 << 50, 40_000) == (1 << 50) // (2 * 64 << 20)
