"""The whole loop on real shards: evaluation, bad updates, and the rows it writes."""

import contextlib
import itertools
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dist_transformer.config import Config, build_config
from dist_transformer.data.batch import Batch
from dist_transformer.data.prepare import prepare_pairs
from dist_transformer.engine.engine import Engine
from dist_transformer.errors import UserError
from dist_transformer.tracking import read_metrics
from dist_transformer.train import trainer
from dist_transformer.train.evaluate import evaluate
from dist_transformer.train.prepare_run import prepare_run
from tests.dist.harness import Mesh, run_ranks

WORDS = ["alpha", "bravo", "charlie", "delta", "echo", "foxtrot", "golf", "hotel", "india", "juliet"]
N_HELD_OUT = 37


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trainer")
    generator = random.Random(1)
    sources = [" ".join(generator.choices(WORDS, k=generator.randint(2, 9))) for _ in range(300)]
    (folder / "source.txt").write_text("".join(f"{line}\n" for line in sources))
    (folder / "target.txt").write_text("".join(f"{line.upper()[::-1]}\n" for line in sources))
    out = folder / "shards"
    prepare_pairs(
        [(folder / "source.txt", folder / "target.txt")], out,
        vocab_size=400, n_shards=4, workers=1, held_out=N_HELD_OUT,
    )  # fmt: skip
    return out


def config_of(shards: str, run_dir: str, **sections: dict[str, Any]) -> Config:
    tree: dict[str, dict[str, Any]] = {
        "run": {"dir": run_dir, "seed": 4},
        "model": {
            "preset": "t5_v1_1_small", "d_model": 32, "d_ff": 48, "n_heads": 2, "head_dim": 16,
            "n_encoder_layers": 1, "n_decoder_layers": 1, "dropout": 0.2,
        },
        "data": {
            "train": shards, "eval": shards, "objective": "pairs", "workers": 0, "window": 64,
            "max_source_len": 24, "max_target_len": 48, "fingerprint": True,
        },
        "train": {"steps": 5, "global_batch_size": 8, "micro_batch_size": 2, "precision": "fp32", "max_bad_steps": 3},
        "optimizer": {"lr": 0.01, "warmup_steps": 3},
        "evaluate": {"every": 100, "batches": None},
        "checkpoint": {"every": 100},
        "tracking": {"every": 1, "wandb": {"mode": "disabled"}},
    }  # fmt: skip
    for name, fields in sections.items():
        tree.setdefault(name, {}).update(fields)
    return build_config(tree)


@contextlib.contextmanager
def joined(mesh: Mesh) -> Iterator[None]:
    """`train` takes the mesh that these ranks already have."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "open_mesh", lambda tp_degree: contextlib.nullcontext(mesh))
        yield


@contextlib.contextmanager
def poisoned(mesh: Mesh, steps: Sequence[int]) -> Iterator[list[dict[str, Tensor]]]:
    """The last rank's loss is NaN in these steps; gives the weights after every step."""
    real = Engine.train_step
    weights: list[dict[str, Tensor]] = []

    def train_step(engine: Engine, micro_batches: Sequence[Batch], n_target_tokens: int, step: int) -> Any:
        hook = None
        if step in steps and mesh.rank == mesh.world_size - 1:
            hook = engine.model.decoder.register_forward_hook(lambda *arguments: arguments[-1] * float("nan"))
        result = real(engine, micro_batches, n_target_tokens, step)
        if hook is not None:
            hook.remove()
        with engine.whole_model() as model:
            weights.append({name: value.detach().clone() for name, value in model.named_parameters()})
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "train_step", train_step)
        yield weights


def run(mesh: Mesh, config: Config, bad: Sequence[int] = ()) -> tuple[str, list[bool]]:
    """(what the run ended with, whether each step after the first moved the weights)."""
    said = ""
    with joined(mesh), poisoned(mesh, bad) as weights:
        try:
            trainer.train(config)
        except UserError as error:
            assert getattr(error, "on_every_rank", False)
            said = str(error)
    pairs = itertools.pairwise(weights)
    return said, [any(not torch.equal(a[name], b[name]) for name in a) for a, b in pairs]


def losses(run_dir: str) -> list[tuple[Any, ...]]:
    keys = ("step", "train/loss", "train/grad_norm", "data/fingerprint")
    return [tuple(row[key] for key in keys) for row in read_metrics(Path(run_dir)) if row["event"] == "train"]


def held_out(mesh: Mesh, shards: str, folder: str) -> dict[str, float]:
    """Held-out loss of the same initial weights, with packing and without."""
    found: dict[str, float] = {}
    for packing in (True, False):
        config = config_of(shards, folder, data={"packing": packing})
        config, tokenizer = prepare_run(config, mesh)
        metrics = evaluate(Engine(config, mesh), config, tokenizer).metrics
        found |= {f"{name} packing={packing}": value for name, value in metrics.items()}
    return found


def on_two_ranks(mesh: Mesh, shards: str, folder: str) -> dict[str, Any]:
    found: dict[str, Any] = {"held out": held_out(mesh, shards, f"{folder}/held-out-2")}
    for stage, precision in [(0, "fp32"), (1, "bf16"), (2, "fp32"), (3, "bf16")]:
        parallel, train = {"zero_stage": stage}, {"precision": precision}
        config = config_of(shards, f"{folder}/bad-{stage}", parallel=parallel, train=train)
        found[f"bad {stage}"] = run(mesh, config, bad=[2, 4])
    found["diverged"] = run(
        mesh, config_of(shards, f"{folder}/diverged", train={"steps": 9}), bad=range(3, 10)
    )
    return found


def on_one_rank(mesh: Mesh, shards: str, folder: str) -> dict[str, Any]:
    found: dict[str, Any] = {"held out": held_out(mesh, shards, f"{folder}/held-out-1")}
    often = {"every": 1, "at_start": True, "samples": 2, "sentences": 3}
    evaluations: dict[str, dict[str, Any]] = {"often": often, "never": {}}
    for name, evaluation in evaluations.items():
        data = {} if evaluation else {"eval": None}
        config = config_of(
            shards,
            f"{folder}/{name}",
            evaluate=evaluation,
            data=data,
            generate={"beam_size": 1, "max_len": 8},
        )
        found[name] = run(mesh, config)
    return found


Found = tuple[dict[str, Any], list[dict[str, Any]], Path]


@pytest.fixture(scope="module")
def found(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Found:
    """(one rank's results, two ranks' results, the folder of their run directories)."""
    folder = tmp_path_factory.mktemp("runs")
    [one] = run_ranks(1, on_one_rank, str(shards), str(folder))
    return one, run_ranks(2, on_two_ranks, str(shards), str(folder)), folder


def test_held_out_loss_does_not_depend_on_the_ranks(found: Found) -> None:
    """Rows that do not divide evenly are filled up with empty ones, which count nothing."""
    one, (first, second), _ = found
    assert first["held out"] == second["held out"]
    assert one["held out"].keys() == first["held out"].keys()
    for name, value in one["held out"].items():
        assert value == pytest.approx(first["held out"][name], rel=1e-6), name
    packed, unpacked = (one["held out"][f"eval/shards/loss packing={packing}"] for packing in (True, False))
    assert packed == pytest.approx(unpacked, rel=1e-5)
    assert 4 < packed < 8


def test_evaluation_does_not_disturb_training(found: Found) -> None:
    *_, folder = found
    often, never = (losses(f"{folder}/{name}") for name in ("often", "never"))
    assert len(often) == 5
    assert often == never
    rows = [row for row in read_metrics(folder / "often") if row["event"] == "eval"]
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4, 5]
    assert all({"eval/shards/loss", "eval/shards/bleu", "eval/shards/chrf"} <= row.keys() for row in rows)
    assert not [row for row in read_metrics(folder / "never") if row["event"] == "eval"]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_bad_update_is_skipped_counted_and_told(stage: int, found: Found) -> None:
    _, ranks, folder = found
    for rank in ranks:
        assert rank[f"bad {stage}"] == ("", [False, True, False, True])
    rows = read_metrics(folder / f"bad-{stage}")
    train = {row["step"]: row for row in rows if row["event"] == "train"}
    assert [train[step]["train/bad_steps"] for step in range(1, 6)] == [0, 1, 1, 2, 2]
    finite = [torch.tensor(train[step]["train/loss"]).isfinite().item() for step in range(1, 6)]
    assert finite == [True, False, True, False, True]
    alerts = [row for row in rows if row["event"] == "alert"]
    assert [row["step"] for row in alerts] == [2, 4]
    assert "update 2 skipped: loss or gradient not finite" in alerts[0]["alert/text"]


def test_a_run_that_has_diverged_stops(found: Found) -> None:
    _, ranks, folder = found
    for rank in ranks:
        said, moved = rank["diverged"]
        assert "step 5: loss or gradient was not finite in 3 updates in a row" in said
        assert "\n" not in said
        assert moved == [True, False, False, False]
    assert max(row["step"] for row in read_metrics(folder / "diverged")) == 5


def test_rows_have_the_keys_that_dashboards_read(found: Found) -> None:
    *_, folder = found
    rows = read_metrics(folder / "often")
    keys = {
        "train": {
            "trainer/tokens_seen", "train/loss", "train/lr", "train/grad_norm", "perf/tokens_per_sec",
            "perf/padding_pct", "perf/step_time_s", "perf/data_time_s", "memory/max_allocated_gib",
            "data/fingerprint",
        },
        "eval": {"eval/shards/loss", "eval/shards/bleu"},
        "checkpoint": set(),
    }  # fmt: skip
    assert {row["event"] for row in rows} == set(keys)
    for row in rows:
        assert {"event", "step", *keys[row["event"]]} <= row.keys()
    train = [row for row in rows if row["event"] == "train"]
    assert [row["train/lr"] for row in train[:3]] == pytest.approx([0.01 / 3, 0.02 / 3, 0.01])
    seen = [row["trainer/tokens_seen"] for row in train]
    assert seen == sorted(set(seen))
    assert all(0 <= row["perf/padding_pct"] < 100 for row in train)
    assert [row["step"] for row in rows if row["event"] == "checkpoint"] == [5]
