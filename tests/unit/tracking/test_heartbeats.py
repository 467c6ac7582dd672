"""Signs of life, and whom they give away."""

from dataclasses import replace
from pathlib import Path

from dist_transformer.tracking.heartbeats import (
    Beat,
    beat_path,
    clear_beats,
    name_suspects,
    read_beats,
    write_beat,
)

NOW = 1_000_000.0


def ranks(*states: tuple[str, int, float]) -> list[Beat]:
    """A beat for each (phase, step, age)."""
    return [
        Beat(rank, f"node{rank}", 1, phase, step, NOW - 60, NOW - age, "a")
        for rank, (phase, step, age) in enumerate(states)
    ]


def suspects(beats: list[Beat]) -> tuple[list[int], str]:
    found, how = name_suspects(beats, silent_after_s=5, now=NOW)
    return [beat.rank for beat in found], how


def test_a_rank_without_a_sign_of_life_is_named() -> None:
    found, how = suspects(ranks(("training", 7, 1), ("training", 7, 30), ("training", 7, 1)))
    assert found == [1]
    assert how == "no sign of life"


def test_else_the_rank_that_the_others_wait_for() -> None:
    found, how = suspects(ranks(("training", 7, 1), ("waiting for data", 7, 1), ("training", 7, 1)))
    assert found == [1]
    assert "waiting for data" in how
    found, how = suspects(ranks(("training", 8, 1), ("training", 7, 1)))
    assert found == [1], "of two, the one that is behind"
    assert "step 7" in how


def test_where_all_hang_in_the_same_place_nobody_is_blamed() -> None:
    assert suspects(ranks(("training", 7, 1), ("training", 7, 1))) == ([], "all ranks are in the same place")


def test_beats_are_read_back_and_old_ones_cleared(tmp_path: Path) -> None:
    write_beat(tmp_path, 0, "training", 1, NOW, "a")  # no folder yet: no reason to fail
    assert read_beats(tmp_path) == []
    clear_beats(tmp_path)
    for rank, attempt in ((0, "a"), (1, "b")):
        write_beat(tmp_path, rank, "training", 3, NOW, attempt)
    beat_path(tmp_path, 2).write_text("{torn")
    assert [beat.rank for beat in read_beats(tmp_path)] == [0, 1]
    assert [beat.rank for beat in read_beats(tmp_path, "b")] == [1]
    first = read_beats(tmp_path)[0]
    assert first == replace(first, phase="training", step=3, since=NOW)
    clear_beats(tmp_path)
    assert read_beats(tmp_path) == []
