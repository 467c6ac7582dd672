"""A position in the data belongs to a run whose rows are the same: every difference is named."""

import copy
from typing import Any

import pytest

from dist_transformer.data.position import STATE_FORMAT, check_state
from dist_transformer.errors import DataError


def identity(**options: Any) -> dict[str, Any]:
    corpus = {"name": "pairs", "folder": "shards", "section": "data", "shards": ["a"]}
    return {
        "seed": 1, "n_lanes": 24, "shares": [1], "corpora": [corpus | {"options": {"seed": 1, "packer": 3, **options}}],
    }  # fmt: skip


def state_of(found: dict[str, Any]) -> dict[str, Any]:
    return {"format": STATE_FORMAT, **copy.deepcopy(found)}


def test_the_same_goes_on() -> None:
    check_state(state_of(identity(subword_dropout=0.1)), identity(subword_dropout=0.1))


@pytest.mark.parametrize(
    ("before", "after", "says"),
    [
        ({"subword_dropout": 0.3}, {}, "subword_dropout was 0.3 and is None"),
        ({}, {"subword_dropout": 0.3}, "subword_dropout was None and is 0.3"),
        ({"subword_dropout_target": 0.0}, {}, "subword_dropout_target was 0.0 and is None"),
        ({"packing": True}, {"packing": False}, "packing was True and is False"),
    ],
)
def test_an_option_that_changes_the_rows_is_refused(
    before: dict[str, Any], after: dict[str, Any], says: str
) -> None:
    with pytest.raises(DataError, match=rf"the order of data changed \({says}\)"):
        check_state(state_of(identity(**before)), identity(**after))
