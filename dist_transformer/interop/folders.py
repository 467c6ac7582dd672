"""A folder that is written beside and renamed: whole, or not there."""

import contextlib
import importlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import dist_transformer
from dist_transformer.errors import ConfigError

Kind = Literal["export", "import"]
MARK = "dist_transformer.json"
"""In every folder that was written here: what looks like one may be somebody else's model."""
_OURS: dict[Kind, set[str]] = {
    "export": {
        MARK,
        "config.json",
        "generation_config.json",
        "model.bin",
        "model.safetensors",
        "shared_vocabulary.json",
        "tokenizer.json",
        "tokenizer_config.json",
    },
    "import": {MARK, "checkpoints", "config.yaml", "tokenizer.json"},
}
"""What is written. `--overwrite` removes nothing else, and no checkpoint of training."""


@contextlib.contextmanager
def new_folder(out: Path, overwrite: bool, kind: Kind = "export") -> Iterator[Path]:
    """A folder to write into, which becomes `out` at the end, and goes away where anything fails.

    Raises:
        ConfigError: `out` is there (and may not be replaced), or cannot be written.
    """
    check_out(out, overwrite, kind)
    partial: Path | None = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
        partial.chmod(0o777 & ~_umask())
        yield partial
        mark = {"wrote": kind, "version": dist_transformer.__version__}
        (partial / MARK).write_text(json.dumps(mark) + "\n", encoding="utf-8")
        if out.exists():
            old = partial.with_name(f"{partial.name}.old")
            out.replace(old)
            partial.replace(out)
            shutil.rmtree(old)
        else:
            partial.replace(out)
    except OSError as error:
        raise ConfigError(f"{error.filename or out}: cannot be written: {error.strerror or error}") from None
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)


def check_out(out: Path, overwrite: bool, kind: Kind = "export") -> None:
    """Refuse a folder that is there; called before anything expensive too.

    Raises:
        ConfigError: it is there, and `overwrite` does not say that it may go, or it holds what is not ours to remove.
    """
    if not out.exists() and not out.is_symlink():
        return
    if not overwrite:
        raise ConfigError(f"{out} is there already: give another OUT, or --overwrite")
    if not out.is_dir() or out.is_symlink():
        raise ConfigError(f"{out} is no folder: it is not overwritten")
    others = sorted(path.name for path in out.iterdir() if path.name not in _OURS[kind])
    others += sorted(
        f"checkpoints/{path.name}"
        for path in (out / "checkpoints").glob("*")
        if path.name not in {"latest", "step-00000000"}
    )
    if others:
        raise ConfigError(f"{out} holds {others[0]}, which no {kind} wrote: it is not overwritten")
    try:
        written = json.loads((out / MARK).read_text(encoding="utf-8"))["wrote"]
    except (OSError, ValueError, KeyError, TypeError):
        written = None
    if written != kind and any(out.iterdir()):
        raise ConfigError(
            f"{out} was not written by `{kind}` ({MARK} does not say so): it is not overwritten"
        )


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def load_package(name: str) -> Any:
    """A package of the optional extra.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ConfigError(f"{name} is not installed: pip install 'dist_transformer[interop]'") from None
