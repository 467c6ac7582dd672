"""Dropout: there in training, the same for the same seed, absent in evaluation."""

import pytest
import torch
from torch import Tensor

from dist_transformer.model.dropout import add_dropped, dropout
from tests.unit.model.small import PRESETS, hidden_states, random_samples, small_model

DTYPES = [torch.float32, torch.bfloat16, torch.float64]

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


class TestDropout:
    """The function itself, on a CPU."""

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("probability", [0.001, 0.1, 0.5, 0.9])
    def test_the_share_that_is_dropped_and_the_scale(self, probability: float, dtype: torch.dtype) -> None:
        """A million draws: the share within 5 standard deviations, what is left scaled so that the mean stays."""
        torch.manual_seed(1)
        n = 1_000_003  # no multiple of four
        y = dropout(torch.ones(n, dtype=dtype), probability, True)
        n_dropped = int((y == 0).sum())
        assert (
            abs(n_dropped - n * probability) < 5 * (n * probability * (1 - probability)) ** 0.5 + n * 2**-16
        )
        kept = y[y != 0].double()
        assert kept.min() == kept.max()
        assert kept[0].item() == pytest.approx(
            1 / (1 - probability), rel=1e-2 if dtype == torch.bfloat16 else 1e-3
        )

    def test_every_place_and_every_neighbour_is_drawn_by_itself(self) -> None:
        """Four elements share a draw of 64 bits: each must be dropped as often, and no two together more often."""
        torch.manual_seed(1)
        n, probability = 200_000, 0.3
        dropped = (dropout(torch.ones(n, 8), probability, True) == 0).double()
        deviation = (probability * (1 - probability) / n) ** 0.5
        assert (dropped.mean(dim=0) - probability).abs().max() < 5 * deviation
        correlations = torch.corrcoef(dropped.T) - torch.eye(8)
        assert correlations.abs().max() < 5 / n**0.5

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_the_gradient_passes_where_the_value_did(self, dtype: torch.dtype) -> None:
        x = torch.randn(5, 7, 3, dtype=dtype).transpose(0, 1).requires_grad_()
        y = dropout(x, 0.4, True)
        assert y.dtype == dtype
        y.backward(torch.ones_like(y))
        assert x.grad is not None
        assert torch.equal(x.grad == 0, y == 0)
        assert x.grad.max().item() == pytest.approx(1 / 0.6, rel=1e-2)
        assert torch.allclose((x * x.grad).double(), y.double(), rtol=1e-2)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_with_a_residual_it_is_the_sum(self, dtype: torch.dtype) -> None:
        """Value and both gradients; neither tensor is contiguous. One rounding less in bfloat16."""
        residual, x = (torch.randn(5, 7, 3, dtype=dtype).transpose(0, 1).requires_grad_() for _ in range(2))
        upstream = torch.randn(7, 5, 3, dtype=dtype)
        torch.manual_seed(1)
        apart = residual + dropout(x, 0.4, True)
        expected = torch.autograd.grad(apart, (residual, x), upstream)
        torch.manual_seed(1)
        together = add_dropped(residual, x, 0.4, True)
        found = torch.autograd.grad(together, (residual, x), upstream)
        rounding = 2**-7 if dtype == torch.bfloat16 else 1e-6
        torch.testing.assert_close(together, apart, rtol=rounding, atol=rounding)
        assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
        assert torch.equal(add_dropped(residual, x, 0.4, False), residual + x)

    def test_nothing_and_everything(self) -> None:
        x = torch.randn(4)
        assert dropout(x, 0.0, True) is x
        assert dropout(x, 0.5, False) is x
        assert not dropout(x, 1.0, True).any()
        assert dropout(torch.empty(0, 3), 0.1, True).shape == (0, 3)
