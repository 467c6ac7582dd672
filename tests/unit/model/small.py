"""Small models of every kind, and rows of samples for them."""

from typing import Any

import torch
from torch import Tensor

from dist_transformer.config import ModelConfig, build_config
from dist_transformer.model import EncoderDecoder, build_model, initialize

VOCAB = 50

Sample = tuple[list[int], list[int]]
"""Source and target."""

CHOICES: dict[str, dict[str, Any]] = {
    **{
        f"positions_{p}": {"positions": p}
        for p in ("sinusoidal", "learned", "relative_bias", "rotary", "none")
    },
    "pre_layer_norm": {"norm_position": "pre"},
    "post_rms_norm": {"norm": "rms_norm"},
    "pre_rms_norm": {"norm": "rms_norm", "norm_position": "pre"},
    **{
        f"ffn_{f}": {"ffn": f}
        for f in ("gelu", "gelu_tanh", "silu", "reglu", "geglu", "geglu_tanh", "swiglu")
    },
    "grouped_query": {"n_kv_heads": 2},
    "multi_query": {"n_kv_heads": 1},
    "grouped_query_rotary": {"n_kv_heads": 2, "positions": "rotary", "qk_norm": True},
    "grouped_query_relative_bias": {"n_kv_heads": 2, "positions": "relative_bias"},
    "qk_norm": {"qk_norm": True},
    "norm_embeddings": {"norm_embeddings": True, "positions": "learned"},
    "no_bias": {"bias": False},
    "head_dim": {"head_dim": 6},
    "tie_inputs": {"tie_embeddings": "inputs"},
    "tie_none": {"tie_embeddings": "none"},
    "scaled_logits": {"scale_logits": True, "scale_attention": False, "scale_embeddings": False},
    "widths": {
        "tie_embeddings": "none",
        "encoder": {"d_model": 48, "n_heads": 6, "d_ff": 40},
        "decoder": {"d_model": 16, "n_heads": 2, "d_ff": 72},
    },
    "widths_rotary_pre": {
        "tie_embeddings": "none",
        "positions": "rotary",
        "norm_position": "pre",
        "encoder": {"d_model": 48, "head_dim": 8},
        "decoder": {"n_kv_heads": 1},
    },
    "relative_bias_widths": {
        "tie_embeddings": "none",
        "positions": "relative_bias",
        "encoder": {"n_heads": 8, "head_dim": 8},
        "relative_buckets": 8,
        "relative_max_distance": 10,
    },
}
"""Each changes one or a few fields of a small post-norm Transformer."""

PRESETS = ("vaswani2017_base", "t5_v1_1_small", "modern_small")
"""One of each family: the others of a family differ in size only."""

KINDS = [*PRESETS, *CHOICES]

_SMALL: dict[str, Any] = {
    "vocab_size": VOCAB,
    "d_model": 32,
    "d_ff": 56,
    "n_heads": 4,
    "n_encoder_layers": 2,
    "n_decoder_layers": 2,
    "dropout": 0.0,
}


def small_config(kind: str, **overrides: Any) -> ModelConfig:
    """The configuration of a kind (a preset or a choice), shrunk."""
    if kind in CHOICES:
        return build_model_config(**{**_SMALL, "max_positions": 64, **CHOICES[kind], **overrides})
    fields = {**_SMALL, "preset": kind, "head_dim": 8}
    if kind.startswith("modern"):
        fields["n_kv_heads"] = 2
    return build_model_config(**{**fields, **overrides})


def build_model_config(**fields: Any) -> ModelConfig:
    """The model's section with these fields, presets applied."""
    data = {"train": "x", "max_source_len": 64, "max_target_len": 64}
    return build_config({"run": {"dir": "x"}, "data": data, "train": {"steps": 1}, "model": fields}).model


def small_model(
    kind: str, dtype: torch.dtype = torch.float32, noise: float = 0.2, **overrides: Any
) -> EncoderDecoder:
    """A small model; its initial weights are moved by `noise`, so that norms and biases matter too."""
    model = build_model(small_config(kind, **overrides))
    initialize(model, seed=3, device=torch.device("cpu"))
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += noise * torch.randn(parameter.shape, generator=generator)
    return model.to(dtype).eval()


def random_samples(n: int, seed: int = 0) -> list[Sample]:
    """Samples of 2 to 8 tokens on each side."""
    generator = torch.Generator().manual_seed(seed)

    def tokens() -> list[int]:
        length = int(torch.randint(2, 9, (), generator=generator))
        return torch.randint(2, VOCAB, (length,), generator=generator).tolist()

    return [(tokens(), tokens()) for _ in range(n)]


def rows_of(packs: list[list[Sample]], source_len: int = 0, target_len: int = 0) -> dict[str, Tensor]:
    """Rows of packed samples as the model's inputs, and `targets`, padded to the longest or to a length."""
    n_source = max([source_len, *(sum(len(s) for s, _ in pack) for pack in packs)])
    n_target = max([target_len, *(sum(len(t) for _, t in pack) for pack in packs)])
    names = ("encoder_input_tokens", "encoder_segment_ids", "encoder_positions")
    inputs = {name: torch.zeros(len(packs), n_source, dtype=torch.int64) for name in names}
    names = ("decoder_input_tokens", "decoder_segment_ids", "decoder_positions", "targets")
    inputs |= {name: torch.zeros(len(packs), n_target, dtype=torch.int64) for name in names}
    for row, pack in enumerate(packs):
        at_source = at_target = 0
        for segment, (source, target) in enumerate(pack, start=1):
            sides = (
                ("encoder", at_source, source, source),
                ("decoder", at_target, target, [0, *target[:-1]]),
            )
            for side, at, tokens, fed in sides:
                places = slice(at, at + len(tokens))
                inputs[f"{side}_input_tokens"][row, places] = torch.tensor(fed)
                inputs[f"{side}_segment_ids"][row, places] = segment
                inputs[f"{side}_positions"][row, places] = torch.arange(len(tokens))
            inputs["targets"][row, at_target : at_target + len(target)] = torch.tensor(target)
            at_source, at_target = at_source + len(source), at_target + len(target)
    return inputs


def hidden_states(model: EncoderDecoder, packs: list[list[Sample]], **lengths: int) -> tuple[Tensor, Tensor]:
    """(hidden states [N, D], targets [N]) of all target tokens, sample after sample, padding left out."""
    inputs = rows_of(packs, **lengths)
    targets = inputs.pop("targets")
    hidden: Tensor = model(**inputs)
    counts = inputs["decoder_segment_ids"] != 0
    return hidden[counts], targets[counts]
