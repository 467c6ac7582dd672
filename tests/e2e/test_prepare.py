"""Text of every kind becomes shards that can be trained on: on one machine, and by several tasks."""

import gzip
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from tests.e2e.conftest import command, environment, sentence
from tests.e2e.test_bad_input import contents, refused

WriteConfig = Callable[..., Path]


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four packed files of JSON lines with a duplicate in each but the first, one bad line, a list, a tokenizer."""
    folder = tmp_path_factory.mktemp("web")
    generator = random.Random(4)
    lines: list[str] = []
    for i in range(4):
        lines = [
            json.dumps({"doc": {"text": f"{i} {sentence(generator)[0]} {n}"}}) for n in range(150)
        ] + lines[:1]
        content = "".join(f"{line}\n" for line in [*lines, *['{"doc": '] * (i == 2)]).encode()
        if i % 2:
            (folder / f"{i}.jsonl.gz").write_bytes(gzip.compress(content))
        else:
            (folder / f"{i}.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(content))
        lines = lines[:150]
    (folder / "list.txt").write_text("\n".join(map(str, sorted(folder.glob("*.jsonl.*")))) + "\n\n")
    done = command(
        "prepare", "tokenizer", "--files-from", folder / "list.txt", "--field", "doc.text", "--vocab-size", 420,
        "--out", folder / "tokenizer.json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "vocabulary of 420" in done.stdout and "1 bad lines left out" in done.stdout
    return folder


def test_json_lines(web: Path, tmp_path: Path) -> None:
    out = tmp_path / "shards"
    arguments = ("prepare", "text", *sorted(web.glob("*.jsonl.*")), "--field", "doc.text", "--out", out)
    refused(*arguments, exit_code=1, says=["2.jsonl.zst, line 152: not a JSON object", "--bad-lines skip"])
    assert not out.exists()
    done = command(
        *arguments, "--bad-lines", "skip", "--dedup", "--tokenizer", web / "tokenizer.json", "--held-out", 40
    )
    assert done.returncode == 0, done.stderr
    for words in ("560 samples in", "40 held out", "3 duplicates left out", "1 bad lines left out"):
        assert words in done.stdout
    counts = json.loads((out / "manifest.json").read_text())["counts"]
    assert counts == {"n_empty": 0, "n_bad_lines": 1, "n_duplicates": 3, "n_split": 0}


def test_tasks_of_an_array(web: Path, tmp_path: Path, write_config: WriteConfig) -> None:
    out = tmp_path / "shards"
    arguments = (
        "prepare", "text", "--files-from", web / "list.txt", "--field", "doc.text", "--bad-lines", "skip",
        "--tokenizer", web / "tokenizer.json", "--shards", 4, "--held-out", 30, "--out", out, "--array",
    )  # fmt: skip
    refused(*arguments, exit_code=2, says=["SLURM_ARRAY_TASK_ID is not set", "--task"])
    in_slurm = environment() | {"SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_COUNT": "2"}
    done = subprocess.run(
        [sys.executable, "-m", "dist_transformer", *map(str, arguments)],
        env=in_slurm, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"when all tasks are done: dist-transformer prepare merge {out}" in done.stdout
    refused("prepare", "merge", out, exit_code=1, says=["task 0 of the 2 tasks", "--array=0 with --tasks 2"])
    refused("train", write_config(out), exit_code=1, says=["not merged yet", f"prepare merge {out}"])
    done = command(*arguments, "--task", 0, "--tasks", 2)
    assert done.returncode == 0, done.stderr
    for _ in range(2):
        done = command("prepare", "merge", out)
        assert done.returncode == 0, done.stderr
        assert "573 samples in 4 shards" in done.stdout and "30 held out" in done.stdout
    assert not (out / "parts").exists()
    config = write_config(out, objective="span_corruption", train={"steps": 2}, data={"max_target_len": 30})
    assert command("train", config).returncode == 0


def test_columns_and_raw_text(pair_files: Path, tmp_path: Path, write_config: WriteConfig) -> None:
    source, target = ((pair_files / f"{side}.txt").read_text().splitlines() for side in ("source", "target"))
    (tmp_path / "pairs.tsv").write_text("".join(f"{s}\t{t}\n" for s, t in zip(source, target, strict=True)))
    done = command(
        "prepare", "pairs", "--raw", tmp_path / "pairs.tsv", "--out", tmp_path / "raw", "--vocab-size", 420,
        "--shards", 4, "--held-out", 40,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "560 samples in 4 shards" in done.stdout
    config = write_config(tmp_path / "raw", train={"steps": 2})
    assert command("train", config).returncode == 0


def test_refused(tmp_path: Path, pair_files: Path) -> None:
    source, target = pair_files / "source.txt", pair_files / "target.txt"
    out = ("--out", tmp_path / "out")
    pairs = ("prepare", "pairs", *out)
    for arguments, exit_code, words in (
        ((*pairs,), 2, ["there is no input: give FILE, --files-from LIST, or --source and --target"]),
        ((*pairs, "--source", source), 2, ["--source and --target go together: 1 and 0 files"]),
        ((*pairs, source), 1, [f"{source}: a file of pairs is .jsonl or .tsv", "--source and --target"]),
        (("prepare", "text", *out), 2, ["there is no input: give FILE or --files-from LIST"]),
        (
            ("prepare", "text", *out, "--files-from", tmp_path / "no"),
            1,
            ["--files-from", "no cannot be read"],
        ),
        (("prepare", "text", source, *out, "--task", 0), 2, ["--task and --tasks go together"]),
        (("prepare", "text", source, *out, "--task", 0, "--tasks", 1), 1, ["prepare tokenizer FILES"]),
        (("prepare", "merge", tmp_path / "out"), 1, ["holds no parts to merge"]),
    ):
        refused(*arguments, exit_code=exit_code, says=words)
    assert not (tmp_path / "out").exists()
    (tmp_path / "a.jsonl").write_text("{}\n")
    refused(
        *pairs,
        "--source",
        tmp_path / "a.jsonl",
        "--target",
        target,
        exit_code=1,
        says=["give it as one file"],
    )


def test_names_from_standard_input(pair_files: Path, tmp_path: Path) -> None:
    before = contents(pair_files)
    done = command(
        "prepare", "text", "--files-from", "-", "--vocab-size", 420, "--out", tmp_path / "out",
        stdin=f"{os.path.relpath(pair_files / 'source.txt', tmp_path)}\n", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert contents(pair_files) == before
