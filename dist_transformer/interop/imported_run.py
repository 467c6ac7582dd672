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
    found = {
        "beam_size": generation.get("num_beams"),
        "length_penalty": generation.get("length_penalty"),
        "stop": next(
            (ours for ours, theirs in STOPS.items() if theirs == generation.get("early_stopping")), None
        ),
        "min_len": _length(generation, "min"),
        "max_len": None if (max_len := _length(generation, "max")) is None else min(max_len, longest),
    }
    if generation.get("do_sample"):
        found |= {
            "sample": True,
            **{name: generation.get(name) for name in ("temperature", "top_k", "top_p")},
        }
    return {name: value for name, value in found.items() if value is not None}


def _length(generation: dict[str, Any], end: str) -> int | None:
    """A limit in our count. Theirs without "new" counts the decoder's start too, and is 20 or 0 where nobody set it."""
    new, whole = generation.get(f"{end}_new_tokens"), generation.get(f"{end}_length")
    if isinstance(new, int):
        return new
    unset = 20 if end == "max" else 0
    return whole - 1 if isinstance(whole, int) and whole > unset else None


def left_out(generation: dict[str, Any]) -> list[str]:
    """A sentence that names what is set of its way to decode and has no counterpart here; none: all has."""
    usual = {
        "no_repeat_ngram_size": (0, None),
        "repetition_penalty": (1.0, None),
        "num_beam_groups": (1, None),
    }
    names = [
        name
        for name in (
            "forced_bos_token_id",
            "bad_words_ids",
            "num_beam_groups",
            "no_repeat_ngram_size",
            "repetition_penalty",
        )
        if generation.get(name) not in usual.get(name, (None,))
    ]
    return [f"not imported, since decoding here has no such rule: {', '.join(names)}"] if names else []


def check_objective(objective: str, tokenizer: TextTokenizer | None) -> None:
    """Refuse gaps where the tokenizer cannot mark them.

    Raises:
        ConfigError: it has no sentinels.
    """
    if tokenizer is not None and objective in ("span_corruption", "ul2") and not tokenizer.sentinel_ids:
        raise ConfigError(
            f"--objective {objective} marks gaps with <extra_id_0>, which the tokenizer does not have"
        )
