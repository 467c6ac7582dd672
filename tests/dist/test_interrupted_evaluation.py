"""An evaluation that is broken off, on several ranks: by all of them, and as if it had not been."""

import contextlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from dist_transformer.config import Config
from dist_transformer.data.stream import TrainStream
from dist_transformer.engine.engine import Engine
from dist_transformer.train.evaluate import Evaluation, EvaluationInterruptedError, evaluate
from dist_transformer.train.prepare_run import prepare_run
from tests.dist.harness import Mesh, run_ranks
from tests.dist.test_bad_steps import weights_of
from tests.dist.test_trainer import config_of, shards

__all__ = ["shards"]

LAYOUTS: dict[str, dict[str, Any]] = {
    "zero3": {"parallel": {"zero_stage": 3}},
    "zero3-bf16": {"parallel": {"zero_stage": 3}, "train": {"precision": "bf16"}},
    "tp2": {"parallel": {"tp_degree": 2, "zero_stage": 0}},
    "tp2-all-positions": {"parallel": {"tp_degree": 2, "sequence_parallel": False, "zero_stage": 0}},
}


@dataclass
class Wish:
    """Comes to one rank's knowledge when it has been asked for so often."""

    while_measuring: float = math.inf
    while_decoding: float = math.inf

    @property
    def stop_requested(self) -> bool:
        self.while_measuring -= 1
        return self.while_measuring < 0

    @property
    def stop_is_known(self) -> bool:
        self.while_decoding -= 1
        return self.while_decoding < 0


@dataclass
class Found:
    losses: list[list[float]]
    weights: dict[str, Tensor]
    evaluation: Evaluation
    n_broken_off: int


def train(mesh: Mesh, config: Config, wishes: list[Wish]) -> Found:
    """Two steps, with an evaluation for each wish between them."""
    config, tokenizer = prepare_run(config, mesh)
    engine = Engine(config, mesh)
    losses, n_broken_off = [], 0
    stream = TrainStream(
        config.data, seed=1, dp_rank=mesh.dp_rank, dp_size=mesh.dp_size,
        micro_batch_size=config.train.micro_batch_size,
    )  # fmt: skip
    with contextlib.closing(stream):
        batches = iter(stream)
        for step in (1, 2):
            losses.append(engine.train_step([next(batches)], 40, step).sums.tolist())
            for wish in wishes if step == 1 else []:
                try:
                    evaluate(engine, config, tokenizer, wish)
                except EvaluationInterruptedError:
                    n_broken_off += 1
    return Found(losses, weights_of(engine), evaluate(engine, config, tokenizer, Wish()), n_broken_off)


def with_and_without(mesh: Mesh, folder: str, shards_folder: str, layout: str) -> tuple[Found, Found]:
    tree = {"train": {}, **LAYOUTS[layout]}
    tree["train"] = {**tree["train"], "global_batch_size": 2 * mesh.dp_size}
    config = config_of(
        shards_folder, f"{folder}/{layout}",
        evaluate={"batches": 4, "metrics": ["bleu"], "sentences": 12, "samples": 2},
        generate={"beam_size": 2, "max_len": 8, "batch_tokens": 1},
        **tree,
    )  # fmt: skip
    is_last = mesh.rank == mesh.world_size - 1
    wishes = [
        Wish(while_measuring=1 if is_last else math.inf),
        Wish(while_decoding=2 if is_last else math.inf),
        Wish(while_decoding=0),
    ]
    return train(mesh, config, wishes), train(mesh, config, [])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_rank_leaves_it_and_training_goes_on_as_without(
    layout: str, shards: Path, tmp_path: Path
) -> None:
    tp_degree = LAYOUTS[layout]["parallel"].get("tp_degree", 1)
    for broken, whole in run_ranks(
        2, with_and_without, str(tmp_path), str(shards), layout, tp_degree=tp_degree
    ):
        assert (broken.n_broken_off, whole.n_broken_off) == (3, 0)
        assert broken.losses == whole.losses
        assert broken.evaluation.metrics == whole.evaluation.metrics
        assert broken.evaluation.samples == whole.evaluation.samples
        assert all(broken.weights[name].equal(whole.weights[name]) for name in whole.weights)
