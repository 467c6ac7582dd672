"""Recomputation keeps less and changes nothing: loss, gradients, dropout and names stay."""

import pytest
import torch
from torch import Tensor

from dist_transformer.config import RecomputeConfig
from dist_transformer.config.schema import RecomputePolicy
from dist_transformer.model import EncoderDecoder
from dist_transformer.parallel.recompute import apply_recompute
from dist_transformer.plan.live_bytes import LiveBytes
from tests.unit.model.small import PRESETS, random_samples, rows_of, small_model

SELECTIVE_KEEPS = {"vaswani2017_base": 0.66, "t5_v1_1_small": 0.4, "modern_small": 0.35}
"""Of what the plain model keeps. By hand for post-norm and ReLU without dropout of attention, in units of d_model an
encoder layer: 9 (input, queries, keys, values, both products of the feed-forward network) of 14."""

ROWS = [random_samples(4, seed=row) for row in range(8)]


def model_of(
    preset: str, encoder: RecomputePolicy, decoder: RecomputePolicy, dropout: float = 0.1, n_layers: int = 12
) -> EncoderDecoder:
    model = small_model(
        preset, dropout=dropout, n_encoder_layers=n_layers, n_decoder_layers=n_layers, d_ff=128, noise=0.02
    )
    apply_recompute(model, RecomputeConfig(encoder=encoder, decoder=decoder))
    return model.train()


def step(model: EncoderDecoder) -> tuple[Tensor, dict[str, Tensor], int]:
    """(loss, gradients by name, bytes kept for the backward pass)."""
    inputs = rows_of(ROWS)
    targets = inputs.pop("targets")
    torch.manual_seed(11)
    known = [*model.parameters(), *inputs.values()]
    with LiveBytes("cpu", grain=1, known=[tensor.detach() for tensor in known]) as live:
        hidden = model(**inputs)
        n_bytes = live.now
    loss = torch.nn.functional.cross_entropy(model.logits(hidden).flatten(0, 1), targets.flatten())
    loss.backward()  # type: ignore[no-untyped-call]
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), gradients, n_bytes


@pytest.mark.parametrize("preset", PRESETS)
def test_less_is_kept_and_nothing_changes(preset: str) -> None:
    """Every tensor that is alive after the forward pass counts, whoever holds it."""
    plain = model_of(preset, "none", "none")
    loss, gradients, n_bytes = step(plain)
    after = torch.get_rng_state()
    shares: dict[tuple[str, str], float] = {}
    policies: list[tuple[RecomputePolicy, RecomputePolicy]] = [
        ("full", "full"),
        ("selective", "selective"),
        ("every_n", "every_n"),
        ("full", "none"),
        ("none", "selective"),
    ]
    for encoder, decoder in policies:
        model = model_of(preset, encoder, decoder)
        assert model.state_dict().keys() == plain.state_dict().keys()
        found_loss, found, kept = step(model)
        shares[encoder, decoder] = kept / n_bytes
        assert torch.equal(found_loss, loss), (encoder, decoder)
        assert found.keys() == gradients.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-7, msg=name)
        # What is drawn afterwards is the same too.
        assert torch.equal(after, torch.get_rng_state())
    assert shares["selective", "selective"] < SELECTIVE_KEEPS[preset], shares
    assert shares["full", "full"] < 0.3, shares
    assert shares["full", "full"] < shares["every_n", "every_n"] < 0.75, shares
    assert shares["full", "none"] < 0.8, shares
    assert shares["none", "selective"] < 0.9, shares


@pytest.mark.parametrize("policy", ["full", "selective"])
def test_dropout_is_drawn_again_as_it_was(policy: RecomputePolicy) -> None:
    """Without restoring the generator, the backward pass would see other masks and give other gradients."""
    loss, gradients, _ = step(model_of("t5_v1_1_small", policy, policy, 0.5, n_layers=2))
    expected_loss, expected, _ = step(model_of("t5_v1_1_small", "none", "none", 0.5, n_layers=2))
    assert torch.equal(loss, expected_loss)
    assert all(torch.allclose(gradients[name], expected[name], rtol=1e-5, atol=1e-7) for name in expected)


def test_every_n_recomputes_one_layer_in_so_many() -> None:
    model = small_model("modern_small", n_encoder_layers=5, n_decoder_layers=3)
    apply_recompute(model, RecomputeConfig(encoder="every_n", decoder="every_n", every=3))
    recomputed = ["forward" in vars(layer) for layer in [*model.encoder.layers, *model.decoder.layers]]
    assert recomputed == [True, False, False, True, False, True, False, False]


@pytest.mark.parametrize("policy", ["full", "selective"])
def test_evaluation_is_left_alone(policy: RecomputePolicy) -> None:
    model = model_of("modern_small", policy, policy, n_layers=2).eval()
    inputs = rows_of([random_samples(2)])
    inputs.pop("targets")
    plain = model_of("modern_small", "none", "none", n_layers=2).eval()
    with torch.no_grad():
        assert torch.equal(model(**inputs), plain(**inputs))
