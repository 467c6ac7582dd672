"""Dropout: there in training, the same for the same seed, absent in evaluation."""

import pytest
import torch
from torch import Tensor

from tests.unit.model.small import PRESETS, hidden_states, random_samples, small_model

ROWS = [random_samples(3)]


def run(kind: str, training: bool, seed: int = 0, **overrides: object) -> Tensor:
    model = small_model(kind, **overrides).train(training)
    torch.manual_seed(seed)
    with torch.no_grad():
        hidden, _ = hidden_states(model, ROWS)
    return hidden


@pytest.mark.parametrize("kind", PRESETS)
@pytest.mark.parametrize("where", ["dropout", "attention_dropout", "ffn_dropout"])
def test_each_kind_of_dropout(kind: str, where: str) -> None:
    rates = {"dropout": 0.0, "attention_dropout": 0.0, "ffn_dropout": 0.0, where: 0.3}
    plain = run(kind, training=False)
    assert torch.equal(run(kind, training=False, **rates), plain)
    first = run(kind, training=True, **rates)
    assert (first - plain).abs().max() > 1e-3
    assert torch.equal(run(kind, training=True, **rates), first)
    assert not torch.equal(run(kind, training=True, seed=1, **rates), first)


@pytest.mark.parametrize("side", ["encoder", "decoder"])
def test_dropout_of_one_stack(side: str) -> None:
    rates = {"attention_dropout": 0.0, "ffn_dropout": 0.0, side: {"dropout": 0.3}}
    plain = run("vaswani2017_base", training=False)
    assert (run("vaswani2017_base", training=True, **rates) - plain).abs().max() > 1e-3


def test_attention_and_feed_forward_follow_dropout_unless_set() -> None:
    model = small_model("t5_v1_1_small", dropout=0.3)
    rates = {module.dropout for module in model.modules() if hasattr(module, "dropout")}
    assert rates == {0.3}
