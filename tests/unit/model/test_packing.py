"""Packed rows and padding change no hidden state, loss or gradient, for every architecture."""

import pytest
import torch
from torch import Tensor

from dist_transformer.model import EncoderDecoder
from dist_transformer.parallel.cross_entropy import linear_cross_entropy
from tests.unit.model.small import KINDS, Sample, hidden_states, random_samples, small_model

SAMPLES = random_samples(5)
UNPACKED = [[sample] for sample in SAMPLES]
PACKED = [SAMPLES[:3], SAMPLES[3:]]


def loss_and_gradients(
    model: EncoderDecoder, packs: list[list[Sample]], **lengths: int
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """(hidden states, loss sum, gradients)."""
    hidden, targets = hidden_states(model, packs, **lengths)
    loss = linear_cross_entropy(
        hidden, model.output_weight, targets, ignore_id=0, label_smoothing=0.1
    ).objective
    names = [name for name, _ in model.named_parameters()]
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    return hidden.detach(), loss.detach(), dict(zip(names, gradients, strict=True))


def assert_same(model: EncoderDecoder, packs: list[list[Sample]], relative: float, **lengths: int) -> None:
    hidden, loss, gradients = loss_and_gradients(model, UNPACKED)
    other_hidden, other_loss, other_gradients = loss_and_gradients(model, packs, **lengths)
    assert hidden.std() > 0.1  # not trivially equal
    assert (hidden - other_hidden).norm() < relative * hidden.norm()
    torch.testing.assert_close(other_loss, loss, rtol=1e-6, atol=0)
    # A key's bias has the gradient 0 (it shifts all scores of a query alike), and so no scale of its own.
    smallest = 1e-3 * torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
    for name, gradient in gradients.items():
        scale = gradient.norm().clamp(min=smallest)
        assert (gradient - other_gradients[name]).norm() < relative * scale, name


@pytest.mark.parametrize("kind", KINDS)
def test_packed_rows_equal_single_samples(kind: str) -> None:
    # In float64 only a wrong formula is as far off as this; the embedding's gradient sums in float32.
    assert_same(small_model(kind, torch.float64), PACKED, 1e-6)


@pytest.mark.parametrize("kind", ["vaswani2017_base", "t5_v1_1_small", "modern_small"])
def test_packed_rows_equal_single_samples_in_fp32(kind: str) -> None:
    assert_same(small_model(kind, noise=0.02), PACKED, 1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_does_not_matter(kind: str) -> None:
    assert_same(small_model(kind, torch.float64), UNPACKED, 1e-6, source_len=31, target_len=29)


@pytest.mark.parametrize("kind", ["positions_sinusoidal", "modern_small", "t5_v1_1_small"])
def test_other_samples_of_a_row_do_not_matter(kind: str) -> None:
    model = small_model(kind, torch.float64)
    with torch.no_grad():
        first, _ = hidden_states(model, [[SAMPLES[0], SAMPLES[1]]])
        second, _ = hidden_states(model, [[SAMPLES[0], SAMPLES[2]]])
    n = len(SAMPLES[0][1])
    torch.testing.assert_close(first[:n], second[:n], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_later_targets_do_not_matter(kind: str) -> None:
    model = small_model(kind, torch.float64)
    source, target = SAMPLES[0][0], list(range(10, 19))
    for place in range(len(target) - 1):
        changed = [*target]
        changed[place] = 5  # is fed to the decoder at place + 1
        with torch.no_grad():
            before, _ = hidden_states(model, [[(source, target)]])
            after, _ = hidden_states(model, [[(source, changed)]])
        torch.testing.assert_close(before[: place + 1], after[: place + 1], rtol=1e-12, atol=1e-12)
        assert (before[place + 1] - after[place + 1]).abs().max() > 1e-3


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "positions_none"])
def test_order_matters(kind: str) -> None:
    model = small_model(kind, torch.float64)
    with torch.no_grad():
        one, _ = hidden_states(model, [[([5, 6, 7, 8], [9, 10])]])
        other, _ = hidden_states(model, [[([6, 5, 7, 8], [9, 10])]])
    assert (one - other).abs().max() > 1e-3
