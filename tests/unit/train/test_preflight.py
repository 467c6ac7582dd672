"""Which node is at fault, and what is written down about it."""

from dataclasses import replace
from pathlib import Path

import pytest

from dist_transformer.train.preflight import (
    EXCLUDED_NAME,
    Facts,
    describe_facts,
    exclude_nodes,
    find_problems,
)

VERSIONS = {"torch": "2.9.0", "the device": "CPU"}


def facts(rank: int, **other: object) -> Facts:
    """A rank in order, two on each host."""
    good = Facts(
        rank=rank, host=f"node{rank // 2}", device="CPU", versions=VERSIONS, clock=1000.0, free_gib=50.0,
        product_s=0.01, read_s=0.001, reduce_s=0.002, problem="",
    )  # fmt: skip
    return replace(good, **other)  # type: ignore[arg-type]


def test_ranks_in_order_have_no_problems() -> None:
    assert find_problems([facts(rank) for rank in range(6)]) == {}
    assert find_problems([facts(0)]) == {}


@pytest.mark.parametrize(
    "other, words",
    [
        ({"problem": "cuda:1 computes wrongly"}, "cuda:1 computes wrongly"),
        ({"free_gib": 0.25}, "only 0.25 GiB are free"),
        ({"versions": {**VERSIONS, "torch": "2.8.1"}}, "torch is 2.8.1, elsewhere 2.9.0"),
        ({"versions": {**VERSIONS, "the device": "V100"}}, "the device is V100, elsewhere CPU"),
        ({"clock": 1009.0}, "its clock is off by +9 s"),
        ({"clock": 900.0}, "its clock is off by -100 s"),
    ],
)
@pytest.mark.parametrize("bad", [0, 3, 5])
def test_the_node_that_differs_is_named(bad: int, other: dict[str, object], words: str) -> None:
    everyone = [facts(rank, **(other if rank == bad else {})) for rank in range(6)]
    found = find_problems(everyone)
    assert list(found) == [f"node{bad // 2}"]
    assert words in found[f"node{bad // 2}"]


def test_a_clock_that_is_nearly_right_is_right() -> None:
    assert find_problems([facts(0), facts(2, clock=1004.0)]) == {}


def test_the_first_problem_of_a_node_is_kept() -> None:
    bad = facts(2, problem="no shard here", clock=5000.0)
    assert find_problems([facts(0), bad, facts(4)]) == {"node1": "no shard here"}


def test_what_is_wrong_everywhere_names_every_node() -> None:
    everyone = [facts(rank, free_gib=0.1) for rank in (0, 2)]
    assert sorted(find_problems(everyone)) == ["node0", "node1"]


def test_the_table_has_a_line_for_each_node() -> None:
    lines = describe_facts([facts(rank) for rank in range(4)])
    assert len(lines) == 3
    assert "node0" in lines[1]
    assert "node1" in lines[2]


def test_nodes_are_excluded_once(tmp_path: Path) -> None:
    exclude_nodes(tmp_path, ["node1"])
    exclude_nodes(tmp_path, ["node1", "node3"])
    assert (tmp_path / EXCLUDED_NAME).read_text() == "node1\nnode3\n"
