"""An imported model as a run directory with one checkpoint, of step 0: every command that takes a run takes it."""

import json
import platform
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml

import dist_transformer
from dist_transformer.checkpoints.folder import FORMAT, Layout, TrainerState, checkpoints_dir
from dist_transformer.checkpoints.pieces import whole
from dist_transformer.checkpoints.publish import partial_folder, publish
from dist_transformer.checkpoints.safe_files import Entry, write_safetensors
from dist_transformer.config import build_config, dump_config
from dist_transformer.data.tokenizer import TextTokenizer
from dist_transformer.errors import ConfigError
from dist_transformer.interop.huggingface import STOPS, Imported

_FILE = "rank-00000.safetensors"
_LONGEST = 512
NO_DATA = "give-data.train"
"""What `data.train` is where no shards were given: training says that they are not there."""


def write_imported_run(
    folder: Path,
    imported: Imported,
    tokenizer: TextTokenizer | None,
    *,
    run_dir: Path,
    data: str | None,
    objective: str,
) -> None:
    """Write `config.yaml`, `tokenizer.json` and `checkpoints/step-00000000`.

    Args:
        folder: is there, and empty.
        run_dir: what the folder will be called.
        data: shards to go on with; None: the configuration must be given some.
        objective: what the model is trained to do with a text, see `data.objective`.

    Raises:
        ConfigError: the parts do not make a valid configuration.
    """
    model = imported.model
    longest = min(_LONGEST, model.max_positions) if model.positions in ("learned", "sinusoidal") else _LONGEST
    config = build_config(
        {
            "run": {"dir": str(run_dir)},
            "model": yaml.safe_load(json.dumps(model.model_dump(mode="json"))),
            "data": {
                "train": data or NO_DATA,
                "objective": objective,
                "max_source_len": longest,
                "max_target_len": longest,
            },
            "train": {"steps": 1000, "init_from": str(run_dir)},
            "generate": _generate(imported.generation, longest),
        },
        source=str(run_dir),
    )
    (folder / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    if tokenizer is not None:
        tokenizer.save(folder / "tokenizer.json")
    partial = partial_folder(checkpoints_dir(folder), 0)
    partial.mkdir(parents=True)
    weights = imported.weights
    pieces = [whole(name, tuple(value.shape)).to_json() for name, value in weights.items()]
    n_elements = sum(value.numel() for value in weights.values())
    entry = Entry("master", torch.float32, (n_elements,), weights.values())
    metadata = {"format": str(FORMAT), "pieces": json.dumps(pieces, separators=(",", ":"))}
    publish(
        partial,
        {_FILE: write_safetensors(partial / _FILE, [entry], metadata)},
        {
            "format": FORMAT,
            "state": asdict(TrainerState()),
            "model": config.model.model_dump(mode="json"),
            # No rank has drawn random numbers for it.
            "layout": asdict(Layout(1, 1, 0, "fp32", "none", False, "import")),
            "optimizer": {"name": config.optimizer.name, "steps": 0},
            "imported": {"family": imported.family},
            "saved_at": round(time.time(), 3),
            "versions": {
                "dist_transformer": dist_transformer.__version__,
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
        },
        {_FILE: pieces},
        keep=1,
        keep_every=None,
    )


def _generate(generation: dict[str, Any], longest: int) -> dict[str, Any]:
    """Its own way to decode, where it says so."""
    max_len = generation.get("max_new_tokens") or generation.get("max_length")
    found = {
        "beam_size": generation.get("num_beams"),
        "length_penalty": generation.get("length_penalty"),
        "stop": next(
            (ours for ours, theirs in STOPS.items() if theirs == generation.get("early_stopping")), None
        ),
        "min_len": generation.get("min_new_tokens"),
        "max_len": min(max_len, longest) if isinstance(max_len, int) and max_len > 20 else None,
    }
    return {name: value for name, value in found.items() if value is not None}


def check_objective(objective: str, tokenizer: TextTokenizer | None) -> None:
    """Refuse gaps where the tokenizer cannot mark them.

    Raises:
        ConfigError: it has no sentinels.
    """
    if tokenizer is not None and objective in ("span_corruption", "ul2") and not tokenizer.sentinel_ids:
        raise ConfigError(
            f"--objective {objective} marks gaps with <extra_id_0>, which the tokenizer does not have"
        )
