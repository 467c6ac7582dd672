"""Export to a folder that Hugging Face's `from_pretrained` reads, and weights from such a folder."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dist_transformer.checkpoints.safe_files import Entry, write_safetensors
from dist_transformer.config import GenerateConfig, ModelConfig, build_config
from dist_transformer.data.token_ids import PAD_ID
from dist_transformer.data.tokenizer import TextTokenizer
from dist_transformer.errors import CheckpointError, ConfigError
from dist_transformer.interop.families import Family, choose_family, family_of, special_ids
from dist_transformer.interop.folders import load_package
from dist_transformer.interop.names import match_names
from dist_transformer.interop.tokenizer import save_for_huggingface
from dist_transformer.model import build_model
from dist_transformer.model.positions import sinusoid_table

# BART's and mBART's tables of positions begin with two rows that nothing reads.
_POSITION_OFFSET = 2
_POSITIONS = (".input.learned.weight",)
_BIAS = "final_logits_bias"
STOPS: dict[str, bool | str] = {"estimate": False, "exact": "never", "first": True}
"""Our `generate.stop` as `early_stopping`."""


@dataclass(frozen=True)
class Decoding:
    """How the exported model is to be used: what becomes `generation_config.json`, and the tokenizer's limits."""

    generate: GenerateConfig
    max_source_len: int
    """Tokens, EOS counted."""
    max_target_len: int
    """Tokens, EOS counted; `generate.max_len` comes first."""
    reads_sentinels: bool
    """`<extra_id_0>` in a text is a sentinel."""


def export_huggingface(
    folder: Path,
    model: ModelConfig,
    weights: Mapping[str, Tensor],
    tokenizer: TextTokenizer,
    decoding: Decoding,
    family: str | None = None,
) -> str:
    """Write `config.json`, `model.safetensors` (float32), the tokenizer and `generation_config.json`.

    Args:
        folder: is there, and empty.
        family: None: the one that fits.

    Returns:
        The family's class in `transformers`.

    Raises:
        ConfigError: the model does not fit the family (or any), or `transformers` is not installed.
    """
    chosen = choose_family(model, family)
    if model.positions == "sinusoidal":
        # Its table is fixed, and no limit here.
        longest = max(decoding.max_source_len, decoding.max_target_len, decoding.generate.max_len or 0)
        model = model.model_copy(update={"max_positions": max(model.max_positions, longest)})
    transformers = load_package("transformers")
    tree = {
        "architectures": [chosen.architecture],
        "model_type": chosen.name,
        "is_encoder_decoder": True,
        **chosen.fields(model),
        **special_ids(),
        "dtype": "float32",
        "transformers_version": transformers.__version__,
    }
    (folder / "config.json").write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")
    theirs = to_huggingface(model, weights, chosen)
    entries = [Entry(name, torch.float32, tuple(value.shape), [value]) for name, value in theirs]
    write_safetensors(folder / "model.safetensors", entries, {"format": "pt"})
    save_for_huggingface(tokenizer, folder, decoding.max_source_len, reads_sentinels=decoding.reads_sentinels)
    assert model.vocab_size is not None
    transformers.GenerationConfig(
        **_search(decoding.generate),
        max_new_tokens=decoding.generate.max_len or decoding.max_target_len,
        # Never emitted here either: padding, and rows of the matrix that no token has.
        suppress_tokens=[PAD_ID, *range(tokenizer.vocab_size, model.vocab_size)],
        **special_ids(),
    ).save_pretrained(folder)
    return chosen.architecture


def _search(generate: GenerateConfig) -> dict[str, Any]:
    """Of `generation_config.json`: how outputs are searched for or drawn. It has no `max_ratio`."""
    fields: dict[str, Any] = {"min_new_tokens": generate.min_len} if generate.min_len else {}
    if generate.sample:
        names = ("temperature", "top_k", "top_p")
        return fields | {"do_sample": True, **{name: getattr(generate, name) for name in names}}
    return fields | {
        "do_sample": False,
        "num_beams": generate.beam_size,
        "length_penalty": generate.length_penalty,
        "early_stopping": STOPS[generate.stop],
    }


def to_huggingface(
    model: ModelConfig, weights: Mapping[str, Tensor], family: Family
) -> Iterator[tuple[str, Tensor]]:
    """Our weights under their names. What they tie is there once."""
    names = match_names(family.table(model), model, weights)
    for name, value in weights.items():
        if name not in names:
            continue
        if name.endswith(_POSITIONS):
            value = torch.cat([torch.zeros(_POSITION_OFFSET, value.shape[1]), value])
        yield names[name], value
    if model.positions == "sinusoidal":
        # Pegasus counts its fixed table among the weights.
        table = sinusoid_table(model.max_positions, model.stack("encoder").d_model, torch.device("cpu"))
        for side in ("encoder", "decoder"):
            yield f"model.{side}.embed_positions.weight", table
    shared, source, target, output = family.embeddings
    matrix = weights["source_embedding.weight"]
    if model.tie_embeddings != "none":
        yield shared, matrix
    if model.tie_embeddings != "all":
        yield output, weights["output.weight"]
        if family.name != "t5":
            yield source, matrix
            yield target, weights.get("target_embedding.weight", matrix)
    if family.name != "t5":
        yield _BIAS, torch.zeros(1, matrix.shape[0])


@dataclass(frozen=True)
class Imported:
    """A Hugging Face model as one of ours."""

    family: str
    model: ModelConfig
    weights: dict[str, Tensor]
    order: list[int]
    """The old id of each new one: padding is 0 and end of sequence 1 here."""
    start_id: int
    """The old id that the decoder starts with."""
    generation: dict[str, Any]
    """Of `generation_config.json`."""

    @property
    def n_parameters(self) -> int:
        """Elements of all weights."""
        return sum(value.numel() for value in self.weights.values())

    def notes(self) -> Iterator[str]:
        """What is not as it was, in sentences."""
        if self.order != sorted(self.order):
            pad, eos = self.order[:2]
            yield f"ids are renumbered: padding was {pad} and is 0, end of sequence was {eos} and is 1"
        if self.start_id != self.order[0]:
            yield (
                f"the decoder started with id {self.start_id} and now with padding, whose row in the input matrix is "
                f"that id's: model.tie_embeddings is {self.model.tie_embeddings}"
            )


def read_huggingface(folder: Path) -> Imported:
    """Read a model that `save_pretrained` has written: T5 v1.1, mT5, Marian, Pegasus, BART, mBART.

    Raises:
        ConfigError: there is none, it is of another architecture, or `transformers` is not installed.
        CheckpointError: its weights cannot be read, or are not those of its configuration.
    """
    file = folder / "config.json"
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} cannot be read: {error}: give a folder of Hugging Face's") from None
    family = family_of(raw if isinstance(raw, dict) else {})
    theirs = _load(folder)
    config = theirs.config.to_dict()
    generation = theirs.generation_config.to_dict()
    pad, eos, start = _special(config, generation, folder)
    order = [pad, eos, *(i for i in range(config["vocab_size"]) if i not in (pad, eos))]
    state = {name: value.detach().float() for name, value in theirs.state_dict().items()}
    matrices = _matrices(state, family, order, start)
    try:
        fields = family.model(config) | {
            "vocab_size": config["vocab_size"],
            "tie_embeddings": _tied(*matrices),
        }
    except KeyError as error:
        raise ConfigError(f"{file} does not say {error}") from None
    model = _checked(fields)
    return Imported(family.name, model, _weights(model, family, state, matrices), order, start, generation)


def from_huggingface(state: Mapping[str, Tensor], model: ModelConfig, family: Family) -> dict[str, Tensor]:
    """A state dict of theirs, with the ids as they are, as ours of a given model.

    Raises:
        CheckpointError: a parameter is missing.
    """
    source, target, output = (state[name] for name in family.embeddings[1:])
    return _weights(model, family, state, (source, target, output))


def _load(folder: Path) -> Any:
    transformers = load_package("transformers")
    # Its tables of missing weights and its warning that T5's output is its own: both are looked at below.
    transformers.utils.logging.set_verbosity(transformers.utils.logging.CRITICAL)
    transformers.utils.logging.disable_progress_bar()
    try:
        theirs, found = transformers.AutoModelForSeq2SeqLM.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, output_loading_info=True
        )
    except Exception as error:  # of any of the packages that read it
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise CheckpointError(f"{folder} cannot be read by transformers: {reason[0]}") from None
    missing = sorted({*found["missing_keys"], *found["mismatched_keys"]})
    if missing:
        raise CheckpointError(f"{folder}: its weights have no {missing[0]}: they are another model's")
    return theirs


def _special(config: Mapping[str, Any], generation: Mapping[str, Any], folder: Path) -> tuple[int, int, int]:
    """Ids of padding, end of sequence, and the decoder's start."""
    ids: list[int] = []
    for name in ("pad_token_id", "eos_token_id", "decoder_start_token_id"):
        value = config.get(name)
        value = generation.get(name) if value is None else value
        if value is None and name == "decoder_start_token_id" and config["model_type"] in ("t5", "mt5"):
            value = ids[0]
        if not isinstance(value, int) or not 0 <= value < config["vocab_size"]:
            raise ConfigError(f"{folder / 'config.json'}: {name} is {value}, which is no token of the model")
        ids.append(value)
    if ids[0] == ids[1]:
        raise ConfigError(
            f"{folder / 'config.json'}: padding and end of sequence are one token ({ids[0]}), and here they are two: "
            "it cannot be imported"
        )
    return ids[0], ids[1], ids[2]


def _matrices(
    state: Mapping[str, Tensor], family: Family, order: list[int], start: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Source's, target's and output's, by our ids. Our decoder starts with padding: that row is its start's."""
    _, *names = family.embeddings
    source, target, output = (state[name][order] for name in names)
    if start != order[0]:
        for name, matrix in zip(names[:2], (source, target), strict=True):
            matrix[0] = state[name][start]
    if (bias := state.get(_BIAS)) is not None and bias.any():
        raise CheckpointError(
            "its final_logits_bias is not zero, and the output projection has no bias here: it cannot be imported"
        )
    return source, target, output


def _tied(source: Tensor, target: Tensor, output: Tensor) -> str:
    if not torch.equal(source, target):
        return "none"
    return "all" if torch.equal(source, output) else "inputs"


def _checked(fields: dict[str, Any]) -> ModelConfig:
    # The other sections only because a configuration has them.
    lengths = {"max_source_len": 1, "max_target_len": 1}
    return build_config(
        {
            "run": {"dir": "."},
            "data": {"train": ".", **lengths},
            "train": {"steps": 1},
            "model": fields,
        }
    ).model


def _weights(
    model: ModelConfig,
    family: Family,
    state: Mapping[str, Tensor],
    matrices: tuple[Tensor, Tensor, Tensor],
) -> dict[str, Tensor]:
    shapes = {name: parameter.shape for name, parameter in build_model(model).named_parameters()}
    names = match_names(family.table(model), model, shapes)
    of_vocabulary = dict(
        zip(("source_embedding.weight", "target_embedding.weight", "output.weight"), matrices, strict=True)
    )
    weights = {}
    for name, shape in shapes.items():
        if name in of_vocabulary:
            value = of_vocabulary[name]
        elif names[name] not in state:
            raise CheckpointError(f"{names[name]} is missing in the Hugging Face weights, needed for {name}")
        else:
            value = state[names[name]]
        if name.endswith(_POSITIONS):
            value = value[_POSITION_OFFSET:]
        if value.shape != shape:
            raise CheckpointError(f"{name} is {list(value.shape)} there and {list(shape)} here")
        weights[name] = value
    return weights
