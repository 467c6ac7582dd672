"""A checkpoint's weights as one file that other programs read: whole, in float32, by the model's own names."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from dist_transformer.checkpoints.folder import check_files, read_description, read_trainer_state
from dist_transformer.checkpoints.reader import CheckpointReader
from dist_transformer.checkpoints.safe_files import Entry, write_safetensors
from dist_transformer.config import Weights
from dist_transformer.errors import CheckpointError

Format = Literal["safetensors", "torch"]


def convert(
    checkpoint: Path, format_: Format, out: Path, overwrite: bool = False, weights: Weights = "current"
) -> tuple[Path, Path, int]:
    """Write the weights to a file, and the model's configuration beside it.

    As safetensors, one parameter at a time is in memory; torch's own format needs all of them.

    Returns:
        The file, the configuration's file, and how many parameters (elements) there are.

    Raises:
        CheckpointError: the checkpoint is damaged or has no such weights, or the file is there or cannot be written.
    """
    beside = out.with_suffix(".json")
    if beside == out:
        raise CheckpointError(f"--out {out}: the configuration would have the same name: give another suffix")
    for file in (out, beside):
        if file.exists() and not overwrite:
            raise CheckpointError(f"{file} is there already: give another --out, or --overwrite")
    check_files(checkpoint)
    description = read_description(checkpoint)
    partial = out.with_name(f"{out.name}.partial")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with CheckpointReader(checkpoint) as reader:
            reader.require(weights)
            if format_ == "torch":
                torch.save(dict(reader.weights(weights)), partial)
            else:
                step = str(read_trainer_state(checkpoint).step)
                write_safetensors(partial, _entries(reader, weights), {"format": "pt", "step": step})
            n_parameters = sum(torch.Size(shape).numel() for shape in reader.shapes.values())
        partial.replace(out)
        tree = {name: description[name] for name in ("model", "versions")}
        beside.write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise CheckpointError(f"{error.filename or out}: cannot be written: {error.strerror}") from None
    return out, beside, n_parameters


def _entries(reader: CheckpointReader, weights: Weights) -> list[Entry]:
    return [
        Entry(name, torch.float32, shape, _one(reader, name, weights))
        for name, shape in reader.shapes.items()
    ]


def _one(reader: CheckpointReader, name: str, weights: Weights) -> Iterator[Tensor]:
    """A parameter, read when it is asked for."""
    yield reader.weight(name, weights)
