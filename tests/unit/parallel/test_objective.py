"""The module that DeepSpeed wraps, on one process: rows that go through the model twice."""

import pytest
import torch

from dist_transformer.config import TrainConfig, build_config
from dist_transformer.data.batch import Batch
from dist_transformer.errors import ConfigError
from dist_transformer.parallel.cross_entropy import TokenLoss
from dist_transformer.parallel.objective import TrainingModule
from dist_transformer.parallel.regions import TensorParallel
from tests.unit.model.small import random_samples, rows_of, small_model


def loss_of(dropout: float, r_drop: float, training: bool = True) -> TokenLoss:
    rows = rows_of([random_samples(2, seed=row) for row in range(3)], source_len=17, target_len=15)
    batch = Batch(decoder_target_tokens=rows.pop("targets"), **rows)
    model = small_model("vaswani2017_base", torch.float64, dropout=dropout)
    module = TrainingModule(
        model, TrainConfig(steps=1, r_drop=r_drop), TensorParallel(None, 0, 1, sequence=False)
    )
    torch.manual_seed(1)
    loss: TokenLoss = module.train(training)(batch)
    return loss


def test_equal_passes_are_one() -> None:
    plain, twice = loss_of(0.0, 0.0), loss_of(0.0, 5.0)
    torch.testing.assert_close(twice.objective, plain.objective, rtol=1e-12, atol=0)
    torch.testing.assert_close(twice.cross_entropy, plain.cross_entropy, rtol=1e-12, atol=0)
    assert (twice.n_correct, twice.n_tokens) == (plain.n_correct, plain.n_tokens)


def test_passes_that_differ_are_drawn_together() -> None:
    """The more, the larger alpha; and not in evaluation."""
    weak, strong = loss_of(0.3, 1.0), loss_of(0.3, 5.0)
    torch.testing.assert_close(weak.cross_entropy, strong.cross_entropy, rtol=1e-12, atol=0)
    divergence = weak.objective - weak.cross_entropy
    assert divergence > 0
    torch.testing.assert_close(strong.objective - strong.cross_entropy, 5 * divergence, rtol=1e-9, atol=0)
    evaluated, plain = loss_of(0.3, 5.0, training=False), loss_of(0.3, 0.0, training=False)
    assert torch.equal(evaluated.objective, plain.objective)
    assert evaluated.is_correct.shape == plain.is_correct.shape


def test_without_dropout_it_is_refused() -> None:
    tree = {"run": {"dir": "x"}, "data": {"train": "shards"}, "model": {"dropout": 0.0}}
    with pytest.raises(ConfigError, match=r"train\.r_drop needs dropout"):
        build_config({**tree, "train": {"steps": 1, "r_drop": 1.0}})
    inside = {**tree, "model": {"dropout": 0.0, "attention_dropout": 0.1}}
    assert build_config({**inside, "train": {"steps": 1, "r_drop": 1.0}}).train.r_drop == 1.0
