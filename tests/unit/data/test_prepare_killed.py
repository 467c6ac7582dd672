"""SIGKILL in the middle of any stage; the same command then gives what an uninterrupted one gives."""

import gzip
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from dist_transformer.data import documents, preparation
from dist_transformer.data.array import merge
from dist_transformer.data.manifest import load_manifest
from dist_transformer.data.prepare import prepare_text
from dist_transformer.errors import DataError
from tests.unit.data.prepared import OPTIONS, content_of, numbered_lines, texts_of

# Stops for good at the n-th call of a function of the package, then runs what the test runs too.
SCRIPT = """
import importlib, sys, time
from dist_transformer.data import documents, preparation
from dist_transformer.data.array import merge
from dist_transformer.data.prepare import prepare_text

if __name__ == "__main__":
    module, name, n_before, statement = sys.argv[1:]
    module = importlib.import_module(module)
    original, calls = getattr(module, name), []

    def stopping(*arguments, **named):
        calls.append(1)
        if len(calls) > int(n_before):
            print("there", flush=True)
            time.sleep(60)
        return original(*arguments, **named)

    setattr(module, name, stopping)
    documents.SEGMENT_BYTES = preparation._MIN_PART_BYTES = 1 << 16
    exec(statement)
"""


def kill_at(folder: Path, place: str, n_before: int, statement: str) -> None:
    """Run a statement in a process of its own and kill it at the call of a function that follows n_before others."""
    script = folder / "main.py"
    script.write_text(textwrap.dedent(SCRIPT))
    module, _, name = place.rpartition(".")
    process = subprocess.Popen(
        [sys.executable, str(script), module, name, str(n_before), statement],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "there\n"
    process.send_signal(signal.SIGKILL)
    process.wait()


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """A compressed and a plain file with documents in common, which are several parts, as in the script."""
    monkeypatch.setattr(documents, "SEGMENT_BYTES", 1 << 16)
    monkeypatch.setattr(preparation, "_MIN_PART_BYTES", 1 << 16)
    lines = numbered_lines(3000)
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(("\n".join(lines) + "\n").encode()))
    (tmp_path / "b.txt").write_text("\n".join(lines[2000:] + numbered_lines(1000, seed=1)) + "\n")
    return [tmp_path / "a.txt.gz", tmp_path / "b.txt"]


@pytest.mark.parametrize(
    ("place", "n_before", "n_shards"),
    [
        ("dist_transformer.data.dedup._save", 0, 0),
        ("dist_transformer.data.dedup._save", 2, 0),
        ("dist_transformer.data.spill._tokenise", 1, 0),
        ("dist_transformer.data.spill.write_shard", 5, 5),
        ("dist_transformer.data.preparation.sha256_of", 0, 9),
    ],
)
def test_preparation(tmp_path: Path, files: list[Path], place: str, n_before: int, n_shards: int) -> None:
    options = {**OPTIONS, "dedup": True, "n_shards": 8}
    out = tmp_path / "out"
    kill_at(tmp_path, place, n_before, f"prepare_text({list(map(str, files))}, {str(out)!r}, **{options})")
    with pytest.raises(DataError, match="is half-written"):
        load_manifest(out)
    finished = {p.name: p.stat().st_mtime_ns for p in out.glob("*.tar")}
    assert len(finished) == n_shards
    prepare_text(files, out, **options)
    assert all((out / name).stat().st_mtime_ns == at for name, at in finished.items()), "kept"
    prepare_text(files, tmp_path / "whole", **options)
    assert content_of(out) == content_of(tmp_path / "whole")
    everything = texts_of(out) + texts_of(out, "eval")
    assert len(everything) == len(set(everything)) == 4000


def test_raw_preparation(tmp_path: Path, files: list[Path]) -> None:
    options = {**OPTIONS, "raw": True, "n_shards": 4}
    out = tmp_path / "out"
    kill_at(
        tmp_path,
        "dist_transformer.data.spill.write_shard",
        2,
        f"prepare_text({list(map(str, files))}, {str(out)!r}, **{options})",
    )
    prepare_text(files, out, **options)
    prepare_text(files, tmp_path / "whole", **options)
    assert content_of(out) == content_of(tmp_path / "whole")


@pytest.mark.parametrize(
    ("place", "n_before"),
    [
        ("dist_transformer.data.array.write_atomically", 0),
        ("dist_transformer.data.array._rename", 0),
        ("dist_transformer.data.array._rename", 3),
        ("dist_transformer.data.array._sync", 0),
        ("shutil.rmtree", 1),
    ],
)
def test_merge(tmp_path: Path, files: list[Path], place: str, n_before: int) -> None:
    prepare_text(files, tmp_path / "one", **OPTIONS)
    for name in ("out", "whole"):
        for task in (1, 0):
            prepare_text(
                files, tmp_path / name, tokenizer=tmp_path / "one" / "tokenizer.json", n_shards=5, held_out=20,
                workers=1, task=task, n_tasks=2,
            )  # fmt: skip
    merge(tmp_path / "whole")
    kill_at(tmp_path, place, n_before, f"merge({str(tmp_path / 'out')!r})")
    for _ in range(2):
        summary = merge(tmp_path / "out")
        assert (summary.n_shards, summary.n_samples, summary.n_eval_samples) == (5, 4980, 20)
        assert content_of(tmp_path / "out") == content_of(tmp_path / "whole")
