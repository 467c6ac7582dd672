"""Initial weights: a function of seed and name, by scheme; and the shapes of every preset."""

import math

import pytest
import torch
from torch import Tensor

from dist_transformer.config import ModelConfig, preset_names
from dist_transformer.model import EncoderDecoder, build_model, initialize
from tests.unit.model.small import KINDS, build_model_config, small_config


def weights(config: ModelConfig, seed: int = 1) -> dict[str, Tensor]:
    model = build_model(config)
    initialize(model, seed, torch.device("cpu"))
    return dict(model.state_dict())


@pytest.mark.parametrize("kind", KINDS)
def test_from_meta_to_weights(kind: str) -> None:
    model = build_model(small_config(kind))
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not list(model.buffers())  # nothing that a checkpoint or a shard would have to carry besides
    initialize(model, 1, torch.device("cpu"))
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in model.parameters())
    state = model.state_dict()
    assert list(state) == [name for name, _ in model.named_parameters()]
    storages = [tensor.untyped_storage().data_ptr() for tensor in state.values()]
    assert len(set(storages)) == len(storages)


def test_seed_decides() -> None:
    config = small_config("t5_v1_1_small")
    first, again, other = weights(config), weights(config), weights(config, seed=2)
    for name, value in first.items():
        assert torch.equal(value, again[name])
        assert name.endswith("norm.weight") or not torch.equal(value, other[name]), name
    matrices = [value for name, value in first.items() if value.ndim == 2 and value.shape == (32, 32)]
    assert len({round(float(m.sum()), 6) for m in matrices}) == len(matrices)  # no two are the same draw


def test_independent_of_other_parameters() -> None:
    shallow = weights(small_config("modern_small", init="t5"))
    deep = weights(small_config("modern_small", init="t5", n_encoder_layers=3, n_decoder_layers=4, bias=True))
    assert len(deep) > len(shallow)
    for name, value in shallow.items():
        assert torch.equal(value, deep[name]), name


def test_only_meta_parameters_are_drawn() -> None:
    model = build_model(small_config("modern_small"))
    mine = torch.nn.Parameter(torch.full((32,), 7.0))
    model.decoder.final_norm.weight = mine  # type: ignore[union-attr, assignment]
    initialize(model, 1, torch.device("cpu"))
    assert dict(model.named_parameters())["decoder.final_norm.weight"] is mine


def assert_std(value: Tensor, expected: float) -> None:
    # The standard deviation of n draws is itself off by 1 / sqrt(2 n); five times that is never seen.
    assert abs(float(value.std()) / expected - 1) < 5 / math.sqrt(2 * value.numel())
    assert abs(float(value.mean())) < 5 * expected / math.sqrt(value.numel())


def test_t5_scheme() -> None:
    state = weights(small_config("t5_v1_1_small", d_model=48, d_ff=80, vocab_size=512, head_dim=16))
    layer = "decoder.layers.0"
    assert_std(state["source_embedding.weight"], 1.0)
    assert_std(state["output.weight"], 48**-0.5)
    assert_std(state[f"{layer}.self_attention.q_proj.weight"], (48 * 16) ** -0.5)
    assert_std(state[f"{layer}.cross_attention.k_proj.weight"], 48**-0.5)
    assert_std(state[f"{layer}.self_attention.v_proj.weight"], 48**-0.5)
    assert_std(state[f"{layer}.self_attention.o_proj.weight"], (4 * 16) ** -0.5)
    assert_std(state[f"{layer}.feed_forward.gate.weight"], 48**-0.5)
    assert_std(state[f"{layer}.feed_forward.up.weight"], 48**-0.5)
    assert_std(state[f"{layer}.feed_forward.down.weight"], 80**-0.5)
    assert_std(state["decoder.relative_bias.weight"], 48**-0.5)
    assert (state[f"{layer}.feed_forward_residual.norm.weight"] == 1).all()


def test_xavier_scheme() -> None:
    state = weights(small_config("vaswani2017_base", d_model=64, d_ff=96, vocab_size=512))
    up = state["encoder.layers.1.feed_forward.up.weight"]
    limit = math.sqrt(6 / (64 + 96))
    assert up.abs().max() <= limit
    assert_std(up, limit / math.sqrt(3))
    assert_std(state["source_embedding.weight"], 64**-0.5)
    assert not state["encoder.layers.1.feed_forward.up.bias"].any()


def test_normal_scheme() -> None:
    state = weights(small_config("modern_small", d_model=64, n_encoder_layers=2, n_decoder_layers=8))
    assert_std(state["source_embedding.weight"], 0.02)
    assert_std(state["encoder.layers.1.feed_forward.up.weight"], 0.02)
    assert_std(state["encoder.layers.1.feed_forward.down.weight"], 0.02 / 2)
    assert_std(state["decoder.layers.1.feed_forward.down.weight"], 0.02 / 4)
    assert_std(state["decoder.layers.1.cross_attention.o_proj.weight"], 0.02 / 4)


@pytest.mark.parametrize("preset", ["t5_v1_1_small", "vaswani2017_base", "modern_small"])
def test_first_loss_is_near_that_of_guessing(preset: str) -> None:
    config = small_config(preset, vocab_size=256, d_model=64)
    model = EncoderDecoder(config)
    model.load_state_dict(weights(config))
    tokens = torch.randint(2, 256, (16, 12), generator=torch.Generator().manual_seed(0))
    segments, positions = torch.ones_like(tokens), torch.arange(12).expand_as(tokens)
    with torch.no_grad():
        logits = model.logits(model.eval()(tokens, segments, positions, tokens, segments, positions))
    targets = torch.randint(2, 256, (16, 12), generator=torch.Generator().manual_seed(1))
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    assert abs(loss - math.log(256)) < 1.0


def n_parameters(preset: str, vocab_size: int) -> int:
    model = build_model(build_model_config(preset=preset, vocab_size=vocab_size))
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("preset", preset_names())
def test_every_preset_builds_without_memory(preset: str) -> None:
    assert n_parameters(preset, 32128) > 10_000_000


@pytest.mark.parametrize(
    ("preset", "expected"),
    # As Hugging Face counts google/t5-v1_1-*.
    [
        ("t5_v1_1_small", 76_961_152),
        ("t5_v1_1_base", 247_577_856),
        ("t5_v1_1_large", 783_150_080),
        ("t5_v1_1_xl", 2_849_757_184),
        ("t5_v1_1_xxl", 11_135_332_352),
    ],
)
def test_t5_has_the_published_size(preset: str, expected: int) -> None:
    assert n_parameters(preset, 32128) == expected


@pytest.mark.parametrize(("preset", "millions"), [("vaswani2017_base", 65), ("vaswani2017_big", 213)])
def test_the_papers_models_have_the_published_size(preset: str, millions: int) -> None:
    """Table 3 of the paper, with its 37 000 shared byte-pair tokens."""
    config = build_model_config(preset=preset, vocab_size=37_000)
    d, f = config.d_model, config.d_ff
    attention, ffn, norm = 4 * (d * d + d), 2 * d * f + f + d, 2 * d
    layers = 6 * (attention + ffn + 2 * norm) + 6 * (2 * attention + ffn + 3 * norm)
    assert n_parameters(preset, 37_000) == 37_000 * d + layers
    assert abs(n_parameters(preset, 37_000) / 1e6 - millions) < 0.04 * millions
