"""What people do with a run: translate, score, fill gaps, look at it."""

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from dist_transformer.config import load_config, preset_names, shipped_files
from dist_transformer.tracking import read_metrics
from dist_transformer.tracking.wandb_log import history, wandb_files
from tests.e2e.conftest import command, environment, launch, steps_of

WriteConfig = Callable[..., Path]


def test_translate_evaluate_report(
    tmp_path: Path, pair_files: Path, pair_shards: Path, write_config: WriteConfig
) -> None:
    config = write_config(
        pair_shards,
        train={"steps": 60},
        optimizer={"lr": 0.01},
        evaluate={"every": 30, "sentences": 20, "samples": 3},
        generate={"beam_size": 2, "max_len": 40},
    )
    done = launch(config, "--nproc", 2)
    assert done.returncode == 0, done.stdout + done.stderr
    run_dir = tmp_path / "run"
    rows = read_metrics(run_dir)
    steps = steps_of(rows)
    assert steps[60]["train/loss"] < 0.7 * steps[1]["train/loss"]
    evaluations = [row for row in rows if row["event"] == "eval"]
    assert [row["step"] for row in evaluations] == [30, 60]
    assert {"eval/shards/loss", "eval/shards/bleu", "eval/shards/chrf"} <= evaluations[-1].keys()
    assert (run_dir / "samples" / "step-00000060.txt").read_text().count("output:") == 3

    lines = (pair_files / "source.txt").read_text().splitlines()[:5]
    greedy = command("generate", run_dir, "--beam-size", "1", stdin="\n".join([*lines, "", lines[0]]) + "\n")
    assert greedy.returncode == 0, greedy.stderr
    outputs = greedy.stdout.splitlines()
    assert len(outputs) == 7
    assert outputs[5] == ""
    assert outputs[6] == outputs[0] != ""

    scored = command(
        "evaluate", run_dir, "--source", pair_files / "source.txt", "--reference", pair_files / "target.txt",
        "--output", tmp_path / "decoded.txt",
    )  # fmt: skip
    assert scored.returncode == 0, scored.stderr
    result = json.loads(scored.stdout)
    assert result["sentences"] == 600
    assert 0 < result["loss"] < steps[1]["train/loss"]
    assert 0 <= result["bleu"] <= 100
    assert "version:" in result["signature"]
    assert len((tmp_path / "decoded.txt").read_text().splitlines()) == 600
    # sacreBLEU's own command agrees.
    command_line = [
        sys.executable,
        "-m",
        "sacrebleu",
        str(pair_files / "target.txt"),
        "-i",
        str(tmp_path / "decoded.txt"),
        "-b",
        "-w",
        "2",
    ]
    bleu = subprocess.run(command_line, capture_output=True, text=True, check=True, env=environment()).stdout
    assert float(bleu) == pytest.approx(result["bleu"], abs=0.011)

    drawn = command("report", run_dir, "--png", tmp_path / "curves.png")
    assert drawn.returncode == 0, drawn.stderr
    page = (run_dir / "report.html").read_text()
    assert page.startswith("<!doctype html>")
    assert not re.findall(r"""(?:src|href)=["']?(?:https?:)?//""", page), "nothing is fetched"
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_pretraining_fills_gaps(tmp_path: Path, text_shards: Path, write_config: WriteConfig) -> None:
    config = write_config(
        text_shards,
        objective="span_corruption",
        train={"steps": 20},
        optimizer={"name": "adamw_rms"},
        recompute={"encoder": "full", "decoder": "full"},
        parallel={"zero_stage": 3},
        evaluate={"samples": 2, "at_start": True},
    )
    done = launch(config, "--nproc", 2)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = read_metrics(tmp_path / "run")
    assert [row["step"] for row in rows if row["event"] == "eval"] == [0, 20]
    assert "<extra_id_0>" in (tmp_path / "run" / "samples" / "step-00000020.txt").read_text()
    filled = command("generate", tmp_path / "run", stdin="def ___(self):\n")
    assert filled.returncode == 0, filled.stderr
    assert filled.stdout.startswith("def ")


def test_wandb_offline_run(tmp_path: Path, pair_shards: Path, write_config: WriteConfig) -> None:
    """The dashboard run holds every training row, and a resumed run goes on in it."""
    config = write_config(
        pair_shards, train={"steps": 4}, tracking={"wandb": {"mode": "offline", "project": "test"}}
    )
    for steps in (4, 6):
        done = command("train", config, f"train.steps={steps}")
        assert done.returncode == 0, done.stderr
        assert "dist-transformer track sync" in done.stdout
    run_dir = tmp_path / "run"
    files = wandb_files(run_dir)
    assert len(files) == 2
    assert len({file.stem for file in files}) == 1
    found = [row["train/loss"] for file in files for row in history(file) if "train/loss" in row]
    steps = steps_of(read_metrics(run_dir))
    assert found == pytest.approx([steps[step]["train/loss"] for step in range(1, 7)])


def test_help_is_quick_and_complete() -> None:
    start = time.perf_counter()
    assert command("--help").returncode == 0
    for words in (
        ["prepare", "text"],
        ["prepare", "pairs"],
        ["prepare", "tokenizer"],
        ["prepare", "merge"],
        ["train"],
        ["generate"],
        ["evaluate"],
        ["report"],
        ["config"],
        ["presets"],
    ):
        done = command(*words, "--help")
        assert done.returncode == 0
        assert "example:\n  " in done.stdout
    # Ten calls; each under a second where nothing else runs. What is asserted is that none of them imports torch.
    heavy = "import sys; from dist_transformer.cli import build_parser; build_parser(); print('torch' in sys.modules)"
    checked = subprocess.run(
        [sys.executable, "-c", heavy], capture_output=True, text=True, env=environment(), check=True
    )
    assert checked.stdout == "False\n"
    assert time.perf_counter() - start < 60


@pytest.mark.parametrize("path", sorted(shipped_files("configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_is_valid(path: Path) -> None:
    config = load_config(path)
    assert config.model.preset in preset_names()
