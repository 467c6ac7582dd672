"""Recomputation keeps less and changes nothing: loss, gradients, dropout and names stay."""

from typing import Literal

import pytest
import torch
from torch import Tensor

from dist_transformer.config import RecomputeConfig
from dist_transformer.model import EncoderDecoder
from dist_transformer.parallel.recompute import apply_recompute
from tests.unit.model.small import PRESETS, random_samples, rows_of, small_model

Policy = Literal["none", "full"]


def model_of(preset: str, encoder: Policy, decoder: Policy, dropout: float = 0.2) -> EncoderDecoder:
    model = small_model(preset, dropout=dropout, n_encoder_layers=4, n_decoder_layers=4)
    apply_recompute(model, RecomputeConfig(encoder=encoder, decoder=decoder))
    return model.train()


def step(model: EncoderDecoder) -> tuple[Tensor, dict[str, Tensor], int]:
    """(hidden states, gradients by name, bytes kept for the backward pass)."""
    inputs = rows_of([random_samples(2, seed=row) for row in range(3)])
    targets = inputs.pop("targets")
    kept: dict[tuple[int, int], int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[(storage.data_ptr(), storage.nbytes())] = storage.nbytes()
        return tensor

    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    torch.manual_seed(11)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = model(**inputs)
    n_bytes = sum(size for (pointer, _), size in kept.items() if pointer not in own)
    loss = torch.nn.functional.cross_entropy(model.logits(hidden).flatten(0, 1), targets.flatten())
    loss.backward()  # type: ignore[no-untyped-call]
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return hidden.detach(), gradients, n_bytes


@pytest.mark.parametrize("preset", PRESETS)
def test_full_recomputation_changes_nothing_and_keeps_less(preset: str) -> None:
    plain = model_of(preset, "none", "none")
    hidden, gradients, n_bytes = step(plain)
    sizes = {}
    for encoder, decoder in (("full", "none"), ("none", "full"), ("full", "full")):
        model = model_of(preset, encoder, decoder)  # type: ignore[arg-type]
        assert [name for name, _ in model.named_parameters()] == [n for n, _ in plain.named_parameters()]
        assert model.state_dict().keys() == plain.state_dict().keys()
        found_hidden, found, sizes[encoder, decoder] = step(model)
        assert torch.equal(found_hidden, hidden)
        assert found.keys() == gradients.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-6, atol=1e-7)
    assert sizes["full", "full"] < 0.3 * n_bytes
    assert sizes["full", "full"] < min(sizes["full", "none"], sizes["none", "full"])
    assert max(sizes["full", "none"], sizes["none", "full"]) < n_bytes


def test_dropout_is_drawn_again_as_it_was() -> None:
    """Without restoring the generator, the backward pass would see other masks and give other gradients."""
    first, second = (
        model_of("t5_v1_1_small", "full", "full", 0.5),
        model_of("t5_v1_1_small", "none", "none", 0.5),
    )
    hidden, gradients, _ = step(first)
    after = torch.get_rng_state()
    expected_hidden, expected, _ = step(second)
    assert torch.equal(hidden, expected_hidden)
    assert all(torch.allclose(gradients[name], expected[name], rtol=1e-5, atol=1e-7) for name in expected)
    # What is drawn afterwards is the same too.
    assert torch.equal(after, torch.get_rng_state())


def test_evaluation_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("modern_small", "full", "full").eval()
    inputs = rows_of([random_samples(2)])
    inputs.pop("targets")
    plain = model_of("modern_small", "none", "none").eval()
    with torch.no_grad():
        assert torch.equal(model(**inputs), plain(**inputs))
