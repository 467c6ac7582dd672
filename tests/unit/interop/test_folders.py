"""An export is whole or not there, and replaces nothing but an export."""

from pathlib import Path

import pytest

from dist_transformer.errors import ConfigError
from dist_transformer.interop.folders import load_package, new_folder


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


@pytest.mark.parametrize("name", ["notes.txt", "checkpoints/step-00000007", "checkpoints/best"])
def test_what_no_export_wrote_stays(name: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(out, "one")
    (out / name).mkdir(parents=True)
    with pytest.raises(ConfigError, match=f"holds {name}, which no export wrote"):
        write(out, "two", overwrite=True)
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
