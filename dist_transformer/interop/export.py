"""A trained model to a folder in another library's format."""

import json
from pathlib import Path
from typing import Literal

import torch

from dist_transformer.checkpoints.safe_files import Entry, write_safetensors
from dist_transformer.config import Config
from dist_transformer.data.tokenizer import TextTokenizer
from dist_transformer.interop.ctranslate2 import export_ctranslate2
from dist_transformer.interop.huggingface import Decoding, export_huggingface
from dist_transformer.model import EncoderDecoder

Target = Literal["huggingface", "ctranslate2", "safetensors"]


def export_run(
    model: EncoderDecoder,
    config: Config,
    tokenizer: TextTokenizer,
    folder: Path,
    to: Target,
    family: str | None = None,
    quantization: str | None = None,
) -> str:
    """Write a model with its tokenizer; what it is now, in a few words.

    Args:
        folder: is there, and empty.
        family: see `export_huggingface`.
        quantization: see `export_ctranslate2`.

    Raises:
        ConfigError: the format has no such architecture, or its package is not installed.
    """
    weights = {name: parameter.detach().cpu() for name, parameter in model.named_parameters()}
    data = config.data
    longest = max(data.max_source_len, data.max_target_len, config.generate.max_len or 0)
    if to == "ctranslate2":
        # A table of fixed positions is no limit here, and costs nothing there.
        n_positions = max(longest, config.model.max_positions)
        export_ctranslate2(folder, config.model, weights, tokenizer, n_positions, quantization)
        return f"CTranslate2 ({quantization or 'float32'})"
    if to == "huggingface":
        decoding = Decoding(
            config.generate,
            data.max_source_len,
            data.max_target_len,
            any(corpus.objective in ("span_corruption", "ul2") for corpus in data.corpora()),
        )
        return export_huggingface(folder, config.model, weights, tokenizer, decoding, family)
    entries = [Entry(name, torch.float32, tuple(value.shape), [value]) for name, value in weights.items()]
    write_safetensors(folder / "model.safetensors", entries, {"format": "pt"})
    tree = config.model.model_dump(mode="json")
    (folder / "config.json").write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")
    tokenizer.save(folder / "tokenizer.json")
    return "float32 weights by their own names, the model's configuration and the tokenizer"
