"""A short course of `benchmarks/chaos.py`: faults of four kinds in one run, which ends as if there had been none."""

import random

import pytest

from benchmarks.chaos import KINDS, choose_kinds, torment
from tests.tools.slurm import LIMIT_S, why_not

pytestmark = pytest.mark.timeout(6 * LIMIT_S)


def test_a_run_comes_through_four_faults() -> None:
    if reason := why_not("loopback"):
        pytest.skip(reason)
    assert torment(("rank", "requeue", "disk", "dashboard"), count=4, seed=1, mode="loopback") == []


def test_every_kind_comes_before_any_comes_again() -> None:
    chosen = choose_kinds(KINDS, 20, random.Random(1))
    assert len(chosen) == 20
    assert set(chosen[: len(KINDS)]) == set(KINDS)
    assert chosen == choose_kinds(KINDS, 20, random.Random(1))
    assert chosen != choose_kinds(KINDS, 20, random.Random(2))
