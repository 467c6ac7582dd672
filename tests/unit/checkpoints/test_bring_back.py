"""A crash between the two renames of a replacement leaves a run that goes on."""

from pathlib import Path

from dist_transformer.checkpoints.folder import latest_checkpoint
from dist_transformer.checkpoints.publish import _put_aside, bring_back


def test_what_was_set_aside_comes_back_where_latest_names_it(tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    for step in (3, 6):
        (root / f"step-{step:08d}").mkdir(parents=True)
    (root / "step-00000006" / "trainer.json").write_text("{}")
    (root / "latest").write_text("step-00000006\n")
    _put_aside(root / "step-00000006")
    _put_aside(root / "step-00000003")  # removed, as an old one: it stays away
    bring_back(root)
    assert latest_checkpoint(tmp_path) == root / "step-00000006"
    assert (root / "step-00000006" / "trainer.json").exists() and not (root / "step-00000003").exists()


def test_nothing_is_touched_where_nothing_is_missing(tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    bring_back(root)  # there is no folder
    (root / "step-00000006").mkdir(parents=True)
    (root / "latest").write_text("step-00000006\n")
    (root / "step-00000006.old.partial").mkdir()
    bring_back(root)
    assert (root / "step-00000006.old.partial").is_dir() and (root / "step-00000006").is_dir()
