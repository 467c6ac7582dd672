"""What ranks that share layers cannot share equally is refused in one sentence, with a fix."""

from typing import Any

import pytest

from dist_transformer.config import build_config
from dist_transformer.errors import ConfigError


def build(tp_degree: int, **model: Any) -> None:
    build_config(
        {
            "run": {"dir": "x"},
            "data": {"train": "x"},
            "train": {"steps": 1},
            "model": {"d_model": 64, "n_heads": 8, "d_ff": 96, **model},
            "parallel": {"tp_degree": tp_degree},
        }
    )


@pytest.mark.parametrize(
    ("tp_degree", "model"),
    [
        (8, {}),
        (2, {"n_kv_heads": 1}),
        (4, {"n_kv_heads": 2}),
        (4, {"vocab_size": 1000}),
        (2, {"encoder": {"n_heads": 6, "head_dim": 8}}),
    ],
)
def test_what_fits(tp_degree: int, model: dict[str, Any]) -> None:
    build(tp_degree, **model)


@pytest.mark.parametrize(
    ("tp_degree", "model", "sentences"),
    [
        (
            3,
            {},
            [
                "parallel.tp_degree=3 does not divide the encoder's n_heads=8: try tp_degree=2",
                "parallel.tp_degree=3 does not divide the decoder's n_heads=8",
                "parallel.tp_degree=3 does not divide model.pad_vocab_to=64: set model.pad_vocab_to=66",
            ],
        ),
        (4, {"decoder": {"d_ff": 90}}, ["does not divide the decoder's d_ff=90: try tp_degree=3"]),
        (
            4,
            {"encoder": {"n_heads": 6, "head_dim": 8}},
            ["parallel.tp_degree=4 does not divide the encoder's n_heads=6: try tp_degree=3"],
        ),
        (4, {"vocab_size": 1001}, ["does not divide model.vocab_size=1001: set model.vocab_size=1004"]),
        (
            4,
            {"n_heads": 12, "n_kv_heads": 6, "head_dim": 8},
            ["neither divides the encoder's n_kv_heads=6 nor is a multiple of it: try tp_degree=3"],
        ),
    ],
)
def test_what_does_not(tp_degree: int, model: dict[str, Any], sentences: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        build(tp_degree, **model)
    for sentence in sentences:
        assert sentence in str(caught.value)
