"""A mixture of objectives through the public command: other ranks and workers after each stop, the same rows."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from dist_transformer.tracking import read_metrics
from tests.e2e.conftest import ROOT, command, launch, steps_of


@pytest.fixture
def config(tmp_path: Path, pair_shards: Path, write_config: Callable[..., Path]) -> Path:
    """Translation, gaps in text, and the same text to go on with."""
    text = tmp_path / "text"
    done = command(
        "prepare", "text", *sorted((ROOT / "dist_transformer" / "model").glob("*.py")), "--documents", "paragraph",
        "--tokenizer", pair_shards / "tokenizer.json", "--shards", "4", "--held-out", "10", "--out", text,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    path = write_config(pair_shards, evaluate={"every": 100, "batches": 2, "samples": 2, "sentences": 4})
    tree: dict[str, Any] = yaml.safe_load(path.read_text())
    tree["data"] |= {"train": None, "eval": None, "objective": "span_corruption", "fingerprint": True}
    tree["data"]["mixture"] = [
        {
            "train": str(pair_shards),
            "eval": str(pair_shards),
            "objective": "pairs",
            "weight": 5,
            "name": "en-de",
        },
        {"train": str(text), "eval": str(text), "weight": 2},
        {"train": str(text), "objective": "prefix_lm", "weight": 1, "name": "going on"},
    ]
    tree["generate"] = {"beam_size": 1, "max_len": 8}
    path.write_text(yaml.safe_dump(tree))
    return path


def test_the_same_rows_whatever_the_ranks_and_the_stops(tmp_path: Path, config: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    done = command("train", config, f"run.dir={whole}", "train.steps=8", "data.workers=0")
    assert done.returncode == 0, done.stderr
    # 5 of 8 rows.
    assert "en-de: 62.5 % of the rows, " in done.stdout and "going on: 12.5 % of the rows, " in done.stdout
    done = launch(config, "--nproc", "2", f"run.dir={parts}", "train.steps=4", "data.workers=1")
    assert done.returncode == 0, done.stdout + done.stderr
    done = command("train", config, f"run.dir={parts}", "train.steps=8", "data.workers=2")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [steps_of(read_metrics(folder)) for folder in (whole, parts)]
    fingerprints = [[row["data/fingerprint"] for _, row in sorted(found.items())] for found in rows]
    assert len(set(fingerprints[0])) == 8
    assert fingerprints[0] == fingerprints[1]

    [evaluated] = [row for row in read_metrics(whole) if row["event"] == "eval"]
    found = {key for key in evaluated if key.startswith("eval/")}
    assert found == {
        "eval/en_de/loss", "eval/en_de/accuracy", "eval/en_de/bleu", "eval/en_de/chrf",
        "eval/en_de/bleu_signature", "eval/en_de/chrf_signature",
        "eval/text/loss", "eval/text/accuracy",
    }  # fmt: skip
    samples = {path.name: path.read_text() for path in (whole / "samples").iterdir()}
    assert set(samples) == {"step-00000008-en_de.txt", "step-00000008-text.txt"}
    assert all(text.count("output:") == 2 for text in samples.values())

    check_objectives(whole, tmp_path)

    done = command("train", config, f"run.dir={whole}", "train.steps=12", "data.mixture.1.weight=9")
    assert done.returncode == 1
    assert "the share of en-de was 62.5 % of the rows and is 33.33 %" in done.stderr


def check_objectives(run: Path, folder: Path) -> None:
    """What a line is for can be said; by default the first corpus's, and of scores pairs'."""
    # As if text had stood first.
    tree = yaml.safe_load((run / "config.yaml").read_text())
    mixture = tree["data"]["mixture"]
    tree["data"]["mixture"] = [mixture[1], mixture[0], mixture[2]]
    (run / "config.yaml").write_text(yaml.safe_dump(tree))
    (folder / "lines.txt").write_text("the dog ___\n")

    def generated(*options: str) -> str:
        done = command("generate", run, "--input", folder / "lines.txt", "--max-len", "4", *options)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert generated().startswith("the dog ") and generated("--objective", "span_corruption") == generated()
    assert not generated("--objective", "pairs").startswith("the dog")
    done = command("generate", run, "--input", folder / "lines.txt", "--objective", "ul2")
    assert done.returncode == 2
    assert "--objective ul2: this run was trained for span_corruption, pairs, prefix_lm" in done.stderr

    def output_of(*options: str) -> str:
        done = command(
            "evaluate", run, "--source", folder / "lines.txt", "--reference", folder / "lines.txt",
            "--output", folder / "out.txt", "--max-len", "4", *options,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return (folder / "out.txt").read_text()

    assert output_of() == generated("--objective", "pairs")
    assert output_of("--objective", "span_corruption") == generated()
