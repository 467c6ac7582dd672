"""Packed rows and padding change no hidden state, loss or gradient, for every architecture."""

from collections import Counter
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dist_transformer.config.data import DataConfig
from dist_transformer.data.assemble import assemble
from dist_transformer.data.batch import Batch
from dist_transformer.data.reader import RawWindow
from dist_transformer.data.rows import PlacedRows
from dist_transformer.data.tokenizer import TextTokenizer
from dist_transformer.data.window import WindowPlan
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


LAYOUTS: dict[str, dict[str, Any]] = {
    "packed": {"packing": True},
    "alone": {"packing": False},
    "bucketed": {"packing": False, "bucket_tokens": 160},
}


def batches_of(objective: str, layout: str, **options: Any) -> list[Batch]:
    """The batches that a window of made-up samples gives in a layout, two rows (or buckets) each."""
    tokenizer = _tokenizer()
    lengths = {"max_source_len": 64, "max_target_len": 48}
    data = DataConfig(train="x", objective=objective, **lengths, **LAYOUTS[layout], **options)  # type: ignore[arg-type]
    plan = WindowPlan.build(data, data.corpora()[0], tokenizer, seed=7, shuffle=True)
    rng = np.random.default_rng(3)
    fields = []
    for low, high in ((2, 40), (1, 30)) if objective == "pairs" else ((1, 16),):
        sizes = rng.integers(low, high, 24)
        fields.append((rng.integers(6, 250, int(sizes.sum())).astype(np.uint16), sizes))
    raw = RawWindow(0, tuple(fields), np.arange(24))
    rows, n_dropped = plan.build_rows(raw, epoch=1, shard=0, window=0, location="x")
    assert n_dropped == 0
    places = np.arange(len(rows))
    placed = PlacedRows(rows, places, places, np.zeros((len(rows), 4), np.int64))
    pairs = (placed.select(places[i : i + 2]) for i in range(0, len(rows), 2))
    return [assemble(pair, **lengths, bucketed=data.bucket_tokens is not None) for pair in pairs]


@cache
def _tokenizer() -> TextTokenizer:
    return TextTokenizer.train(iter(["the house"] * 9), 400)


def samples_in(batches: list[Batch]) -> Counter[tuple[tuple[int, ...], tuple[int, ...]]]:
    found: Counter[tuple[tuple[int, ...], tuple[int, ...]]] = Counter()
    for batch in batches:
        for row in range(len(batch.encoder_input_tokens)):
            for segment in range(1, int(batch.encoder_segment_ids[row].max()) + 1):
                source = batch.encoder_input_tokens[row][batch.encoder_segment_ids[row] == segment]
                target = batch.decoder_target_tokens[row][batch.decoder_segment_ids[row] == segment]
                found[tuple(source.tolist()), tuple(target.tolist())] += 1
    return found


def trained_on(model: EncoderDecoder, batches: list[Batch]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """(loss sum, target tokens, gradient sums) over batches."""
    total, n_tokens = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.int64)
    sums = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    for batch in batches:
        hidden = model(
            batch.encoder_input_tokens,
            batch.encoder_segment_ids,
            batch.encoder_positions,
            batch.decoder_input_tokens,
            batch.decoder_segment_ids,
            batch.decoder_positions,
        )
        targets = batch.decoder_target_tokens.flatten()
        loss = linear_cross_entropy(hidden.flatten(0, 1), model.output_weight, targets, ignore_id=0)
        gradients = torch.autograd.grad(loss.objective, list(model.parameters()))
        for (_, summed), gradient in zip(sums.items(), gradients, strict=True):
            summed += gradient
        total, n_tokens = total + loss.objective.detach(), n_tokens + int(loss.n_tokens)
    return total, n_tokens, sums


@pytest.mark.parametrize("objective", ["pairs", "span_corruption", "ul2", "prefix_lm"])
@pytest.mark.parametrize("kind", ["vaswani2017_base", "t5_v1_1_small", "modern_small"])
def test_layouts_of_the_same_samples_train_the_same(kind: str, objective: str) -> None:
    """Packed, alone and bucketed rows, as the data layer makes them: one loss and one gradient."""
    model = small_model(kind, noise=0.02, vocab_size=448)
    # Documents are too short for packing to cut them and all layouts have the same pieces.
    layouts = {layout: batches_of(objective, layout) for layout in LAYOUTS}
    samples = samples_in(layouts["alone"])
    assert samples.total() == 24 and all(samples_in(batches) == samples for batches in layouts.values())
    assert len(layouts["alone"]) > max(len(layouts["packed"]), len(layouts["bucketed"]))
    assert all(batch.encoder_input_tokens.shape[1] < 64 for batch in layouts["bucketed"])
    loss, n_tokens, gradients = trained_on(model, layouts["alone"])
    smallest = 1e-3 * torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
    for layout in ("packed", "bucketed"):
        other_loss, other_n_tokens, other_gradients = trained_on(model, layouts[layout])
        assert other_n_tokens == n_tokens > 24
        torch.testing.assert_close(other_loss, loss, rtol=1e-5, atol=0)
        for name, gradient in gradients.items():
            scale = gradient.norm().clamp(min=smallest)
            assert (gradient - other_gradients[name]).norm() < 1e-5 * scale, (layout, name)


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
