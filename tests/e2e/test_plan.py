"""`dist-transformer plan`, as a user runs it."""

import json
import re
from pathlib import Path

import pytest

from tests.e2e.conftest import ROOT, command

BASE = ROOT / "configs" / "pretrain_t5_base.yaml"
SMALL = (
    "model.n_encoder_layers=1",
    "model.n_decoder_layers=1",
    "model.vocab_size=1024",
    "train.global_batch_size=256",
)


def test_a_shipped_recipe_on_two_nodes() -> None:
    done = command("plan", BASE, "--nodes", 2, "--gpus-per-node", 8, "--gpu", "h100")
    assert done.returncode == 0 and not done.stderr, done.stderr
    for part in (
        "247.6 M parameters",
        "dp 16 x tp 1",
        "of 79.1: fits",
        "tokens/s of both sides, MFU",
        "assumed",
    ):
        assert part in done.stdout
    total = sum(
        float(line[48:]) for line in done.stdout.split("memory of")[1].split("together")[0].splitlines()[1:]
    )
    together = float(done.stdout.split("together")[1].split()[0])
    assert total == pytest.approx(together, abs=0.05)


NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?")


def test_the_document_shows_what_the_command_prints() -> None:
    """The same words; numbers may differ by as much as versions of torch do."""
    document = (ROOT / "docs" / "planning.md").read_text()
    shown = document.split("--gpu h100\n```\n\n```\n")[1].split("```")[0]
    recipe = ROOT / "configs" / "pretrain_modern_large.yaml"
    done = command("plan", recipe, "--nodes", 2, "--gpus-per-node", 8, "--gpu", "h100", cwd=ROOT)
    assert re.sub(r" +", " ", NUMBER.sub("#", done.stdout)) == re.sub(r" +", " ", NUMBER.sub("#", shown))
    printed, written = (
        [float(number.replace(",", "")) for number in NUMBER.findall(text)] for text in (done.stdout, shown)
    )
    assert printed == pytest.approx(written, rel=0.05)


def test_what_does_not_fit_is_no_error() -> None:
    """It is an answer: exit code 0, and the size that is missing."""
    done = command("plan", BASE, *SMALL, "--memory-gib", 1)
    assert done.returncode == 0 and "of 1.0: does not fit, " in done.stdout


def test_search_for_programs() -> None:
    done = command("plan", BASE, *SMALL, "--gpus-per-node", 2, "--gpu", "a100-40", "--search", "--json")
    assert done.returncode == 0 and not done.stderr, done.stderr
    found = json.loads(done.stdout)
    assert found["fits"] and found["gpu"] == "A100 40 GB" and found["vocab_size"] == 1024
    assert found["best"] and all(best["fits"] for best in found["best"])
    assert found["best"][0]["tokens_per_s"] >= 0.98 * found["tokens_per_s"]


def test_search_for_people() -> None:
    done = command("plan", BASE, *SMALL, "--gpus-per-node", 1, "--search")
    assert "the fastest layouts that fit:" in done.stdout and "train.micro_batch_size=" in done.stdout
    none = command("plan", BASE, *SMALL, "--gpus-per-node", 1, "--search", "--memory-gib", 1)
    assert (
        "no layout of this model fits these GPUs; try parallel.offload=optimizer" in none.stdout
        and none.returncode == 0
    )


def test_the_vocabulary_is_that_of_the_shards(pair_shards: Path) -> None:
    overrides = [f"data.train={pair_shards}", "data.objective=pairs", "model.vocab_size=null"]
    done = command("plan", BASE, *SMALL, *overrides, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert str(pair_shards) in found["vocab_size_from"] and found["vocab_size"] % 8 == 0


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--gpu", "h1000"], "--gpu h1000 is not in the table: did you mean h100"),
        (["--gpus-per-node", 7], "is not a multiple of train.micro_batch_size=32 x 7 data-parallel ranks"),
        (["--gpus-per-node", 7, "--search"], "cannot be shared out over 7 GPUs: make it a multiple of 7"),
        (["parallel.tp_degree=16"], "parallel.tp_degree=16 does not divide"),
        (["--efficiency", "70"], "70 is not a share, such as 0.7"),
        (["--memory-gib", "0"], "0 is not a positive number"),
        (["--network", "fast"], "fast is not a number"),
    ],
)
def test_bad_input_is_one_sentence(arguments: list[str], sentence: str) -> None:
    done = command("plan", BASE, *arguments)
    assert done.returncode == 2 and sentence in done.stderr, done.stderr
    assert done.stderr.count("\n") == 1 and not done.stdout
