"""What compiled layers and FlexAttention do not go with, refused before anything starts."""

from typing import Any

import pytest

from dist_transformer.config import build_config
from tests.unit.config.test_load import MINIMAL, problems_of


@pytest.mark.parametrize(
    ("tree", "needed"),
    [
        ({"parallel": {"zero_stage": 3}}, "zero_stage 0, 1 or 2"),
        ({"parallel": {"tp_degree": 2}}, "tp_degree=1"),
        ({"recompute": {"decoder": "selective"}}, "recompute none, full or every_n"),
        ({"data": {"train": "x", "packing": False, "bucket_tokens": 4096}}, "rows of one shape"),
    ],
)
def test_what_compiled_layers_do_not_go_with(tree: dict[str, Any], needed: str) -> None:
    compiled = {**MINIMAL, "train": {"steps": 1, "compile": True}}
    build_config(compiled)
    [found] = problems_of({**compiled, **tree})
    assert f"train.compile needs {needed}" in found


@pytest.mark.parametrize(
    ("tree", "needed"),
    [
        ({"model": {"dropout": 0.1}}, "model.attention_dropout=0"),
        ({"model": {"attention_dropout": 0.1}}, "model.attention_dropout=0"),
        ({"data": {"train": "x", "packing": False}}, "data.packing=true"),
        ({"recompute": {"encoder": "selective"}}, "recompute none, full or every_n"),
    ],
)
def test_what_flex_attention_does_not_go_with(tree: dict[str, Any], needed: str) -> None:
    flex = {**MINIMAL, "train": {"steps": 1, "attention": "flex"}, "model": {"dropout": 0.0}}
    build_config(flex)
    [found] = problems_of({**flex, **tree})
    assert f"train.attention=flex needs {needed}" in found
