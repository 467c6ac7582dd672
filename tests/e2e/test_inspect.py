"""`dist-transformer data inspect`, as a user runs it."""

import json
import os
import pty
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests.e2e.conftest import ROOT, command, environment

ESCAPE = "\x1b"


def inspected(*arguments: str | Path) -> str:
    done = command("data", "inspect", *arguments)
    assert done.returncode == 0, done.stderr
    assert ESCAPE not in done.stdout, "colours went into a pipe"
    return done.stdout


def flat(text: str) -> str:
    """Without the line breaks of an 80-column page."""
    return re.sub(r"\s+", " ", text)


def on_a_terminal(*arguments: str | Path, **variables: str) -> str:
    """What the command writes to a terminal."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "dist_transformer", *map(str, arguments)],
        stdin=subprocess.DEVNULL, stdout=theirs, stderr=subprocess.PIPE,
        env={**environment(), "TERM": "xterm-256color", "COLUMNS": "100", **variables}, cwd=ROOT,
    )  # fmt: skip
    os.close(theirs)
    written = b""
    while True:
        try:
            piece = os.read(ours, 65536)
        except OSError:  # how Linux says that the other end is closed
            break
        written += piece
    _, errors = process.communicate(timeout=60)
    os.close(ours)
    assert process.returncode == 0, errors
    return written.decode()


def test_a_folder_of_pairs(pair_shards: Path) -> None:
    said = flat(inspected(pair_shards, "data.max_source_len=64", "--rows", "1"))
    manifest = json.loads((pair_shards / "manifest.json").read_text())
    for split in ("train", "eval"):
        totals = manifest["totals"][split]
        assert f"{split} {totals['n_shards']} {totals['n_samples']}" in said
        assert f"{totals['n_source_tokens']:,} {totals['n_target_tokens']:,}" in said
    assert "objective pairs" in said
    assert "tokens of a source: " in said
    assert "tokens of a target: " in said
    assert "█" in said
    # As many target tokens as stand against 64 source tokens in the corpus, EOS counted.
    totals = manifest["totals"]["train"]
    n_source, n_target = (totals[f"n_{side}_tokens"] + totals["n_samples"] for side in ("source", "target"))
    assert f"packed rows of 64 source and {round(64 * n_target / n_source)} target tokens" in said
    assert "4 lanes, which serve ranks x workers of 1, 2, 4" in said
    # A toy translation: the target is the source backwards.
    source, target = re.search(r"1 source (.*?)</s>.*?target (.*?)</s>", said).groups()
    assert target == " ".join(word.upper()[::-1] for word in reversed(source.split()))


def test_text_on_a_terminal(text_shards: Path) -> None:
    """A removed span and both of its sentinels have one colour; nothing is coloured where NO_COLOR is set."""
    arguments = (
        "data",
        "inspect",
        text_shards,
        "data.max_source_len=64",
        "data.max_target_len=20",
        "--rows",
        "1",
    )
    shown = on_a_terminal(*arguments)
    styles = re.findall(r"\x1b\[([0-9;]*)m<extra_id_0>", shown)
    assert len(styles) >= 2
    assert set(styles) == {"1;31"}, "sentinels of the first span"
    assert re.search(r"<extra_id_0>\x1b\[0m\x1b\[31m", shown), "the first span's text"
    assert {"1;32"} == set(re.findall(r"\x1b\[([0-9;]*)m<extra_id_1>", shown))
    plain = on_a_terminal(*arguments, NO_COLOR="1")
    assert not re.search(r"\x1b\[[0-9;]*3[0-9]m", plain)
    uncoloured = re.sub(r"\x1b\[[0-9;]*m", "", plain)
    assert uncoloured == re.sub(r"\x1b\[[0-9;]*m", "", shown)


def test_ul2_shows_modes_as_json(text_shards: Path) -> None:
    found = json.loads(
        inspected(
            text_shards, "data.objective=ul2", "data.max_source_len=64", "data.max_target_len=32", "--json",
            "--rows", "40", "--windows", "1000",
        )
    )  # fmt: skip
    manifest = json.loads((text_shards / "manifest.json").read_text())
    (corpus,) = found["corpora"]
    assert corpus["n_samples_read"] == manifest["totals"]["train"]["n_samples"]
    assert sum(corpus["lengths"][0]["counts"]) == corpus["n_samples_read"]
    assert corpus["lengths"][0]["longest"] <= 200
    assert 0.8 < corpus["fill"]["source_share"] <= 1
    assert [row["number"] for row in found["rows"]] == list(range(40))
    samples = [sample for row in found["rows"] for sample in row["samples"]]
    first = [sample["source"][0] for sample in samples]
    assert {part["role"] for part in first} == {"mode"}
    assert {part["text"] for part in first} == {"[R]", "[S]", "[X]"}
    for mode, sample in zip(first, samples, strict=True):
        named = {part["span"] for part in sample["source"] if part["role"] == "sentinel"}
        assert {part["span"] for part in sample["target"] if part["role"] == "sentinel"} == named
        assert bool(named) == (mode["text"] != "[S]")


def test_what_a_run_with_a_mixture_sees(
    tmp_path: Path, text_shards: Path, write_config: Callable[..., Path]
) -> None:
    config = write_config(text_shards)
    tree = yaml.safe_load(config.read_text())
    tree["data"] = {
        "max_source_len": 64, "max_target_len": 32, "window": 64,
        "mixture": [
            {"train": str(text_shards), "name": "spans", "weight": 3},
            {"train": str(text_shards), "name": "prefixes", "weight": 1, "objective": "prefix_lm"},
        ],
    }  # fmt: skip
    config.write_text(yaml.safe_dump(tree))
    found = json.loads(inspected(config, "--json", "--rows", "8", "--step", "5"))
    assert [corpus["share_of_rows"] for corpus in found["corpora"]] == [0.75, 0.25]
    assert [row["number"] for row in found["rows"]] == list(range(40, 48)), "5 steps of 8 rows come before"
    said = flat(inspected(config, "data.mixture.0.weight=1", "--rows", "0"))
    for corpus in found["corpora"]:
        assert f"{corpus['name']}: {text_shards}" in said
        assert f"{corpus['name']} 50.00% 4,000 {corpus['rows_per_epoch']:,.0f}" in said
    assert "row 0" not in said


@pytest.fixture
def damaged(tmp_path: Path, text_shards: Path) -> Path:
    """A shard with a byte changed where a header is."""
    folder = tmp_path / "damaged"
    shutil.copytree(text_shards, folder)
    shard = folder / "train-00000.tar"
    content = bytearray(shard.read_bytes())
    content[0:4] = b"!!!!"
    shard.write_bytes(bytes(content))
    return folder


def test_bad_input(tmp_path: Path, pair_shards: Path, damaged: Path) -> None:
    (tmp_path / "empty").mkdir()
    for arguments, exit_code, says in (
        ((tmp_path / "none",), 1, [f"{tmp_path / 'none'} does not exist", "dist-transformer prepare"]),
        ((tmp_path / "empty",), 1, ["no manifest.json", "dist-transformer prepare"]),
        ((tmp_path / "none.yaml",), 2, ["none.yaml: no such configuration file"]),
        ((pair_shards, "data.objective=ul2"), 1, ["ul2 needs text", str(pair_shards)]),
        ((pair_shards, "data.max_source_length=9"), 2, ["max_source_length: unknown key", "max_source_len?"]),
        ((pair_shards, "--rows", "-1"), 2, ["--rows", "-1 is negative"]),
        ((damaged,), 1, [str(damaged / "train-00000.tar")]),
    ):
        done = command("data", "inspect", *arguments)
        assert done.returncode == exit_code, (arguments, done.stdout, done.stderr)
        assert done.stderr.count("\n") == 1, done.stderr
        for words in says:
            assert words in done.stderr
    skipped = flat(inspected(damaged, "data.on_bad_shard=skip", "--rows", "0", "data.max_target_len=120"))
    assert "lost to damage" in skipped
    assert "train-00000.tar" in skipped.replace(" ", "")
