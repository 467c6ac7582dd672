"""`tracking.json`: created once, read for ever, replaced when damaged."""

import json
import re
from pathlib import Path

import pytest

from dist_transformer.tracking import load_or_create_ids


def test_ids_are_created_once_and_kept(tmp_path: Path) -> None:
    said: list[str] = []
    first = load_or_create_ids(tmp_path / "run", "project", said.append)
    content = (tmp_path / "run/tracking.json").read_text()
    assert re.fullmatch(r"[a-z0-9]{12}", first.wandb_run_id) and first.wandb_project == "project"
    assert load_or_create_ids(tmp_path / "run", "project", said.append) == first
    assert (tmp_path / "run/tracking.json").read_text() == content and said == []
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["tracking.json"]
    assert load_or_create_ids(tmp_path / "other", "project", said.append).wandb_run_id != first.wandb_run_id


def test_a_run_stays_in_its_project(tmp_path: Path) -> None:
    said: list[str] = []
    first = load_or_create_ids(tmp_path, "old", said.append)
    assert load_or_create_ids(tmp_path, "new", said.append) == first
    assert len(said) == 1 and "belongs to the W&B project old, not new" in said[0]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "not JSON"),
        (b'{"version": 1, "wan', "not JSON"),
        (b"\xff\xfe\x00", "not JSON"),
        (b"[]", "no wandb section"),
        (b'{"wandb": {"run_id": "../../etc", "project": "p"}}', "run_id is missing or no valid id"),
        (b'{"wandb": {"run_id": 7, "project": "p"}}', "run_id is missing or no valid id"),
        (b'{"wandb": {"run_id": "abcdefgh"}}', "project is missing"),
    ],
)
def test_a_damaged_file_is_said_kept_beside_and_replaced(
    tmp_path: Path, content: bytes, problem: str
) -> None:
    path = tmp_path / "tracking.json"
    for number, kept in enumerate(["tracking.json.damaged", "tracking.json.damaged-2"], 1):
        path.write_bytes(content)
        said: list[str] = []
        ids = load_or_create_ids(tmp_path, "p", said.append)
        assert len(said) == 1 and problem in said[0] and kept in said[0]
        assert (tmp_path / kept).read_bytes() == content
        assert json.loads(path.read_text())["wandb"] == {"run_id": ids.wandb_run_id, "project": "p"}
        assert len(list(tmp_path.iterdir())) == 1 + number


def test_a_lost_run_id_is_found_in_the_newest_wandb_folder(tmp_path: Path) -> None:
    for name in (
        "run-20260101_000000-older111",
        "offline-run-20260301_000000-newer222",
        "latest-run",
        "cache",
    ):
        (tmp_path / "wandb" / name).mkdir(parents=True)
    (tmp_path / "tracking.json").write_text("{")
    said: list[str] = []
    assert load_or_create_ids(tmp_path, "p", said.append).wandb_run_id == "newer222"
    assert "the run id was found in wandb/" in said[0]


def test_a_place_that_cannot_be_written_costs_only_the_continuity(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    said: list[str] = []
    ids = load_or_create_ids(tmp_path / "file", "p", said.append)
    assert len(ids.wandb_run_id) == 12 and len(said) == 1 and "tracking.json" in said[0]
