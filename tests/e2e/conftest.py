"""Small corpora, prepared once a session by the public command, and a way to run commands."""

import functools
import os
import random
import resource
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 240
WORDS = ("alpha", "bravo", "charlie", "delta", "echo", "foxtrot", "golf", "hotel", "india", "juliet")

Run = Callable[..., "subprocess.CompletedProcess[str]"]


def command(
    *arguments: str | Path, cwd: Path | None = None, stdin: str | None = None
) -> "subprocess.CompletedProcess[str]":
    """`dist-transformer ARGUMENTS`, with output captured and a time limit."""
    return subprocess.run(
        [sys.executable, "-m", "dist_transformer", *map(str, arguments)],
        cwd=cwd,
        input=stdin,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        env=environment(),
    )


def launch(*arguments: str | Path, max_file_bytes: int | None = None) -> "subprocess.CompletedProcess[str]":
    """`launch/local.sh ARGUMENTS`, whose processes may write no larger file than that."""

    def limit() -> None:
        if max_file_bytes is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (max_file_bytes, max_file_bytes))

    return subprocess.run(
        [str(ROOT / "launch" / "local.sh"), *map(str, arguments)],
        preexec_fn=limit,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        env=environment(),
    )


def environment() -> dict[str, str]:
    """One thread a process, no GPU, no dashboard account."""
    kept = {
        key: value for key, value in os.environ.items() if not key.startswith(("WANDB", "RANK", "WORLD_SIZE"))
    }
    return {
        **kept,
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHON": sys.executable,
        "PYTHONPATH": str(ROOT),
    }


def sentence(generator: random.Random) -> tuple[str, str]:
    """A toy translation: words of one alphabet to words of another, in reverse order."""
    words = [generator.choice(WORDS) for _ in range(generator.randint(2, 9))]
    return " ".join(words), " ".join(word.upper()[::-1] for word in reversed(words))


@pytest.fixture(scope="session")
def pair_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """source.txt and target.txt."""
    folder = tmp_path_factory.mktemp("pairs")
    generator = random.Random(5)
    pairs = [sentence(generator) for _ in range(600)]
    (folder / "source.txt").write_text("".join(f"{s}\n" for s, _ in pairs))
    (folder / "target.txt").write_text("".join(f"{t}\n" for _, t in pairs))
    return folder


@pytest.fixture(scope="session")
def pair_shards(pair_files: Path) -> Path:
    """A folder of prepared pairs."""
    out = pair_files / "shards"
    done = command(
        "prepare", "pairs", "--source", pair_files / "source.txt", "--target", pair_files / "target.txt",
        "--vocab-size", 420, "--shards", 4, "--held-out", 40, "--out", out,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="session")
def text_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of prepared text: this project's own documentation strings."""
    folder = tmp_path_factory.mktemp("text")
    sources = sorted((ROOT / "dist_transformer").rglob("*.py"))
    done = command(
        "prepare", "text", *sources, "--documents", "file", "--vocab-size", 600, "--shards", 4,
        "--max-document-tokens", 200, "--out", folder / "shards",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder / "shards"


def _write(folder: Path, shards: Path, objective: str = "pairs", **sections: dict[str, object]) -> Path:
    tree: dict[str, dict[str, object]] = {
        "run": {"dir": str(folder / "run"), "seed": 3},
        "model": {
            "preset": "modern_small", "d_model": 32, "d_ff": 64, "n_heads": 2, "n_kv_heads": 1, "head_dim": 16,
            "n_encoder_layers": 2, "n_decoder_layers": 2, "dropout": 0.1,
        },
        "data": {
            "train": str(shards), "eval": str(shards), "objective": objective,
            "max_source_len": 64, "max_target_len": 64, "window": 64,
        },
        "train": {
            "steps": 40, "global_batch_size": 8, "micro_batch_size": 2, "precision": "fp32", "label_smoothing": 0.1,
        },
        "optimizer": {"lr": 0.005, "warmup_steps": 10},
        "checkpoint": {"every": 20, "keep": 2},
        "evaluate": {"every": 20, "batches": 2},
        "tracking": {"every": 1, "wandb": {"mode": "disabled"}},
    }  # fmt: skip
    for name, fields in sections.items():
        tree.setdefault(name, {}).update(fields)
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.fixture
def write_config(tmp_path: Path) -> Callable[..., Path]:
    """A small configuration for a folder of shards; keyword sections are merged over it."""
    return functools.partial(_write, tmp_path)


@pytest.fixture(scope="module")
def module_config(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """As `write_config`, for runs that several tests of a module look at."""
    return functools.partial(_write, tmp_path_factory.mktemp("config"))


def steps_of(rows: Sequence[dict[str, object]]) -> dict[int, dict[str, object]]:
    """Training rows by step; a step that was done twice by its last row."""
    return {int(str(row["step"])): row for row in rows if row["event"] == "train"}
