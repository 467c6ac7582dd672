"""A checkpoint of any layout goes on in any other: the next ten losses are those of the run that was not moved."""

import tempfile
from collections.abc import Iterator
from typing import Any

import pytest

from tests.dist.harness import Mesh, run_ranks
from tests.dist.resharding import (
    Place,
    largest_difference,
    resume_all,
    same_layout_with_dropout,
    save_all,
)

# All starts of ranks are one fixture.
pytestmark = pytest.mark.timeout(1600)
RELATIVE = 1e-4
LIMIT_S = 500
T5, PAPER = "t5_v1_1_small", "vaswani2017_base"


def crossing(source: tuple[Any, ...], target: tuple[Any, ...], preset: str) -> tuple[Place, Place]:
    return Place(*source, preset=preset), Place(*target, preset=preset)


# (tp, dp, stage[, precision, offload]): every ordered pair of stages, and every pair of layouts over them.
CROSSINGS = [
    crossing((1, 2, 0), (2, 2, 1), "modern_small"),
    crossing((2, 2, 0), (1, 4, 2), T5),
    crossing((2, 1, 0), (2, 2, 3), PAPER),
    crossing((1, 4, 1), (2, 1, 0), "modern_small"),
    crossing((2, 1, 1), (1, 4, 2), T5),
    crossing((2, 2, 1), (1, 2, 3), PAPER),
    crossing((1, 2, 2), (2, 1, 0), "modern_small"),
    crossing((2, 2, 2), (1, 2, 1), T5),
    crossing((1, 4, 2), (2, 2, 3), PAPER),
    crossing((2, 2, 3), (1, 2, 0), "modern_small"),
    crossing((1, 4, 3), (2, 2, 1), T5),
    crossing((2, 1, 3), (1, 4, 2), PAPER),
    # What is kept is float32 whatever is computed with, and wherever it lies.
    crossing((2, 2, 3, "fp32", "all"), (1, 4, 2, "fp32", "optimizer"), "modern_small"),
]
IDS = [f"{source}_to_{target}" for source, target in CROSSINGS]
SAME = [Place(2, 1, 3), Place(2, 1, 1, preset=T5)]


def on_ranks(
    world: Mesh, folder: str, saves: list[Place], resumes: list[tuple[Place, Place]], same: list[Place]
) -> tuple[dict[str, list[float]], list[list[float]], list[Any]]:
    return (
        save_all(world, saves, folder),
        resume_all(world, resumes, folder),
        [same_layout_with_dropout(world, place, f"{folder}/same-{place}") for place in same],
    )


def places(world_size: int) -> list[Place]:
    """What worlds of this size save."""
    return sorted({source for source, _ in CROSSINGS if source.world_size == world_size}, key=str)


def into(world_size: int) -> list[tuple[Place, Place]]:
    return [pair for pair in CROSSINGS if pair[1].world_size == world_size]


Found = tuple[dict[str, list[float]], dict[tuple[Place, Place], list[float]], list[Any]]


@pytest.fixture(scope="module")
def found() -> Iterator[Found]:
    """(losses where it was saved, losses where it went on, the same layout): three starts of ranks for all tests."""
    with tempfile.TemporaryDirectory() as folder:
        saved, _, same = run_ranks(2, on_ranks, folder, places(2), [], SAME, limit_s=LIMIT_S)[0]
        saved4, resumed4, _ = run_ranks(4, on_ranks, folder, places(4), into(4), [], limit_s=LIMIT_S)[0]
        _, resumed2, _ = run_ranks(2, on_ranks, folder, [], into(2), [], limit_s=LIMIT_S)[0]
        resumed = dict(zip(into(4), resumed4, strict=True)) | dict(zip(into(2), resumed2, strict=True))
        yield saved | saved4, resumed, same


@pytest.mark.parametrize("pair", CROSSINGS, ids=IDS)
def test_the_next_losses_are_those_of_the_run_that_was_not_moved(
    pair: tuple[Place, Place], found: Found
) -> None:
    source, _ = pair
    expected, actual = found[0][f"{source.preset}-{source}"], found[1][pair]
    assert largest_difference(expected, actual) < RELATIVE
    # The comparison would see a run that had begun anew, or with other moments.
    assert expected[0] - expected[-1] > 100 * RELATIVE * expected[0]


@pytest.mark.parametrize("index", range(len(SAME)), ids=map(str, SAME))
def test_the_same_layout_draws_the_same_dropout(index: int, found: Found) -> None:
    expected, actual, other_seed = found[2][index]
    assert actual == expected
    assert other_seed != expected
