"""What a stack is made of once overrides are applied and nulls filled in, and which shapes are refused."""

from typing import Any

import pytest
from pydantic import ValidationError

from dist_transformer.config import ModelConfig, StackConfig


def test_defaults_are_the_papers_base_model() -> None:
    for side, n_layers in (("encoder", 6), ("decoder", 6)):
        assert ModelConfig().stack(side) == StackConfig(  # type: ignore[arg-type]
            side=side, n_layers=n_layers, d_model=512, d_memory=512, d_ff=2048,
            n_heads=8, n_kv_heads=8, head_dim=64, dropout=0.1,
        )  # fmt: skip


def test_overrides_of_one_stack_leave_the_other() -> None:
    model = ModelConfig.model_validate(
        {
            "d_model": 96,
            "d_ff": 192,
            "n_heads": 6,
            "n_kv_heads": 3,
            "tie_embeddings": "none",
            "n_encoder_layers": 12,
            "n_decoder_layers": 2,
            "dropout": 0.2,
            "encoder": {"d_model": 64, "n_heads": 4, "n_kv_heads": 2, "dropout": 0.0},
            "decoder": {"d_ff": 100, "head_dim": 24},
        }
    )
    assert model.stack("encoder") == StackConfig(
        side="encoder", n_layers=12, d_model=64, d_memory=64, d_ff=192,
        n_heads=4, n_kv_heads=2, head_dim=16, dropout=0.0,
    )  # fmt: skip
    assert model.stack("decoder") == StackConfig(
        side="decoder", n_layers=2, d_model=96, d_memory=64, d_ff=100,
        n_heads=6, n_kv_heads=3, head_dim=24, dropout=0.2,
    )  # fmt: skip


def test_the_models_own_head_dim_is_kept_by_an_override_of_the_heads() -> None:
    model = ModelConfig.model_validate(
        {"d_model": 64, "n_heads": 4, "head_dim": 32, "decoder": {"n_heads": 8}}
    )
    assert model.stack("encoder").head_dim == model.stack("decoder").head_dim == 32
    assert model.stack("decoder").n_kv_heads == 8


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"n_heads": 6}, "n_heads=6 does not divide d_model=512: try 4 or 8, or set head_dim"),
        ({"n_heads": 8, "n_kv_heads": 3}, "n_kv_heads=3 does not divide n_heads=8: try 1 or 2 or 4 or 8"),
        ({"positions": "rotary", "head_dim": 63}, "rotary positions need an even head_dim, not 63"),
        ({"d_model": 15, "n_heads": 5}, "sinusoidal positions need an even d_model, not 15"),
        (
            {"decoder": {"d_model": 256}},
            "tie_embeddings=all needs one d_model for both stacks, not [256, 512]",
        ),
        ({"tie_embeddings": "inputs", "encoder": {"d_model": 256}}, "set tie_embeddings: none"),
        ({"decoder": {"n_heads": 7}}, "n_heads=7 does not divide d_model=512"),
    ],
)
def test_shapes_that_do_not_fit(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError) as caught:
        ModelConfig.model_validate(fields)
    assert says in str(caught.value)


def test_a_fitting_suggestion_is_accepted() -> None:
    for n_heads in (4, 8):
        ModelConfig(n_heads=n_heads, d_model=512)
    ModelConfig(n_heads=6, d_model=512, head_dim=64)


def test_a_problem_of_both_stacks_is_said_once() -> None:
    with pytest.raises(ValidationError) as caught:
        ModelConfig(n_heads=6)
    assert str(caught.value).count("does not divide") == 1
