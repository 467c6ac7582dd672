"""A folder that is written beside and renamed: whole, or not there."""

import contextlib
import importlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dist_transformer.errors import ConfigError

_OURS = {
    "checkpoints",
    "config.json",
    "config.yaml",
    "generation_config.json",
    "model.bin",
    "model.safetensors",
    "shared_vocabulary.json",
    "tokenizer.json",
    "tokenizer_config.json",
}
"""What an export or import writes. `--overwrite` removes nothing else, and no checkpoint of training."""


@contextlib.contextmanager
def new_folder(out: Path, overwrite: bool) -> Iterator[Path]:
    """A folder to write into, which becomes `out` at the end, and goes away where anything fails.

    Raises:
        ConfigError: `out` is there (and may not be replaced), or cannot be written.
    """
    check_out(out, overwrite)
    partial = out.with_name(f"{out.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        if out.exists():
            old = out.with_name(f"{out.name}.old.partial")
            out.replace(old)
            partial.replace(out)
            shutil.rmtree(old)
        else:
            partial.replace(out)
    except OSError as error:
        raise ConfigError(f"{error.filename or out}: cannot be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_out(out: Path, overwrite: bool) -> None:
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
    others = sorted(path.name for path in out.iterdir() if path.name not in _OURS)
    others += sorted(
        f"checkpoints/{path.name}"
        for path in (out / "checkpoints").glob("*")
        if path.name not in {"latest", "step-00000000"}
    )
    if others:
        raise ConfigError(f"{out} holds {others[0]}, which no export wrote: it is not overwritten")


def load_package(name: str) -> Any:
    """A package of the optional extra.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ConfigError(f"{name} is not installed: pip install 'dist_transformer[interop]'") from None
