"""An export is whole or not there, and replaces nothing but an export."""

from pathlib import Path

import pytest

from dist_transformer.errors import ConfigError
from dist_transformer.interop.folders import Kind, load_package, new_folder


def write(out: Path, text: str, overwrite: bool = False) -> None:
    with new_folder(out, overwrite) as folder:
        (folder / "config.json").write_text(text)


def test_whole_or_not_there(tmp_path: Path) -> None:
    out = tmp_path / "a" / "out"
    with pytest.raises(RuntimeError), new_folder(out, overwrite=False) as folder:
        (folder / "config.json").write_text("half")
        raise RuntimeError
    assert list((tmp_path / "a").iterdir()) == []
    write(out, "one")
    assert (out / "config.json").read_text() == "one"


def test_overwriting(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(out, "one")
    with pytest.raises(ConfigError, match=r"out is there already: give another OUT, or --overwrite"):
        write(out, "two")
    write(out, "two", overwrite=True)
    assert (out / "config.json").read_text() == "two"
    assert list(tmp_path.iterdir()) == [out]
    with pytest.raises(RuntimeError), new_folder(out, overwrite=True):
        raise RuntimeError
    assert (out / "config.json").read_text() == "two"


def test_somebody_elses_model_stays(tmp_path: Path) -> None:
    """It has the same names, but no mark, or another command's."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("theirs")
    with pytest.raises(ConfigError, match="was not written by `export`"):
        write(out, "two", overwrite=True)
    assert (out / "config.json").read_text() == "theirs"
    run = tmp_path / "run"
    with new_folder(run, overwrite=False, kind="import") as folder:
        (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match="was not written by `export`"):
        write(run, "two", overwrite=True)
    beside = tmp_path / "run.partial"
    beside.mkdir()
    (beside / "mine.txt").write_text("")
    with new_folder(run, overwrite=True, kind="import") as folder:
        (folder / "tokenizer.json").write_text("[]")
    assert (run / "tokenizer.json").read_text() == "[]" and (beside / "mine.txt").exists()
    assert run.stat().st_mode & 0o777 == beside.stat().st_mode & 0o777


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("export", "notes.txt"),
        ("export", "checkpoints"),
        ("import", "checkpoints/step-00000007"),
        ("import", "checkpoints/best"),
    ],
)
def test_what_no_export_wrote_stays(kind: Kind, name: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with new_folder(out, overwrite=False, kind=kind) as folder:
        (folder / "tokenizer.json").write_text("one")
    (out / name).mkdir(parents=True)
    with (
        pytest.raises(ConfigError, match=f"holds {name}, which no {kind} wrote"),
        new_folder(out, overwrite=True, kind=kind),
    ):
        pass
    assert (out / name).exists()


def test_a_file_stays(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.write_text("mine")
    with pytest.raises(ConfigError, match="is no folder"):
        write(out, "two", overwrite=True)
    assert out.read_text() == "mine"


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        write(tmp_path / "file" / "out", "one")


def test_a_package_that_is_missing() -> None:
    with pytest.raises(ConfigError, match=r"is not installed: pip install 'dist_transformer\[interop\]'"):
        load_package("no_such_package")
