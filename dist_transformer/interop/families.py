"""Hugging Face's families of encoder-decoders: what fits each, its configuration from ours, and ours from its.

None of this needs `transformers`: a configuration is a dictionary, as in `config.json`.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from dist_transformer.config import ModelConfig
from dist_transformer.config.model import Side
from dist_transformer.data.token_ids import EOS_ID, PAD_ID
from dist_transformer.errors import ConfigError
from dist_transformer.interop.names import BART, T5_GATED, T5_PLAIN, Table

Fields = dict[str, Any]

# T5 calls tanh's approximation "gelu", where a gate is; `gelu_python` is the exact one.
_T5_FFN = {
    "relu": "relu",
    "gelu": "gelu",
    "gelu_tanh": "gelu_new",
    "silu": "silu",
    "reglu": "gated-relu",
    "geglu": "gated-gelu_python",
    "geglu_tanh": "gated-gelu",
    "swiglu": "gated-silu",
}
_BART_FFN = {"relu": "relu", "gelu": "gelu", "gelu_tanh": "gelu_new", "silu": "silu"}
_ALIASES = {
    "gelu_pytorch_tanh": "gelu_new",
    "gelu_fast": "gelu_new",
    "gelu_python": "gelu",
    "swish": "silu",
    "gated-gelu_new": "gated-gelu",
    "gated-gelu_pytorch_tanh": "gated-gelu",
    "gated-swish": "gated-silu",
}


@dataclass(frozen=True)
class Family:
    """One of Hugging Face's architectures."""

    name: str
    """As `--family` has it; also its `model_type`."""
    architecture: str
    """The class in `transformers`."""
    needs: Mapping[str, object]
    """Fields of `ModelConfig` that are fixed, each with its value, or a tuple of those that fit."""
    same: tuple[str, ...]
    """Fields of a stack that encoder and decoder must share."""
    table: Callable[[ModelConfig], Table]
    """Names of its parameters."""
    fields: Callable[[ModelConfig], Fields]
    """Our model to its configuration."""
    model: Callable[[Mapping[str, Any]], Fields]
    """Its configuration to our model's fields, `vocab_size` and `tie_embeddings` left out."""
    embeddings: tuple[str, str, str, str]
    """Its matrices over the vocabulary: shared, source's, target's, output's."""

    def misfit(self, model: ModelConfig) -> str | None:
        """Why this model is none of the family, or None."""
        return next(self._misfits(model), None)

    def _misfits(self, model: ModelConfig) -> Iterator[str]:
        for name, value in self.needs.items():
            found = getattr(model, name)
            fits = value if isinstance(value, tuple) else (value,)
            if found not in fits:
                yield f"model.{name} is {_shown(found)}, not {' or '.join(map(_shown, fits))}"
        encoder, decoder = model.stack("encoder"), model.stack("decoder")
        for stack in (encoder, decoder):
            if stack.n_kv_heads != stack.n_heads:
                yield f"its {stack.n_heads} query heads share {stack.n_kv_heads} key-value heads"
        for name in self.same:
            values = getattr(encoder, name), getattr(decoder, name)
            if values[0] != values[1]:
                yield f"encoder and decoder differ in {name} ({values[0]} and {values[1]})"
        for stack in (encoder, decoder):
            if self.name != "t5" and stack.head_dim * stack.n_heads != stack.d_model:
                yield f"heads of its {stack.side} are {stack.head_dim} wide, not d_model / n_heads"


def _shown(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def choose_family(model: ModelConfig, name: str | None) -> Family:
    """The family that is asked for, or the one that fits.

    Raises:
        ConfigError: the model's architecture is another; the sentence says in what.
    """
    if name is not None:
        if name not in FAMILIES:
            raise ConfigError(f"--family {name}: there are {', '.join(FAMILIES)}")
        reason = FAMILIES[name].misfit(model)
        if reason is not None:
            raise ConfigError(f"this model is no {name} of Hugging Face's: {reason}")
        return FAMILIES[name]
    reasons = []
    for family in FAMILIES.values():
        reason = family.misfit(model)
        if reason is None:
            return family
        reasons.append(f"{family.name} ({reason})")
    raise ConfigError(f"no family of Hugging Face's has this architecture: {', '.join(reasons)}")


def family_of(config: Mapping[str, Any]) -> Family:
    """The family of a `config.json`.

    Raises:
        ConfigError: it is none that can be imported.
    """
    model_type = config.get("model_type")
    if model_type is None:
        raise ConfigError("its config.json names no model_type: give a folder of Hugging Face's")
    family = FAMILIES.get("t5" if model_type == "mt5" else str(model_type))
    if family is None:
        raise ConfigError(f"model_type {model_type} cannot be imported: there are mt5, {', '.join(FAMILIES)}")
    return family


def special_ids() -> Fields:
    """What every exported configuration says of special tokens."""
    return {
        "pad_token_id": PAD_ID,
        "eos_token_id": EOS_ID,
        "bos_token_id": None,
        "decoder_start_token_id": PAD_ID,
    }


def _t5_fields(model: ModelConfig) -> Fields:
    stack = model.stack("encoder")
    fields = {
        "vocab_size": model.vocab_size,
        "d_model": stack.d_model,
        "d_kv": stack.head_dim,
        "d_ff": stack.d_ff,
        "num_layers": model.n_encoder_layers,
        "num_decoder_layers": model.n_decoder_layers,
        "num_heads": stack.n_heads,
        "relative_attention_num_buckets": model.relative_buckets,
        "relative_attention_max_distance": model.relative_max_distance,
        "dropout_rate": model.dropout,
        "layer_norm_epsilon": model.norm_eps,
        "feed_forward_proj": _T5_FFN[model.ffn],
        # Transformers 5 ties whatever stands here, unless the weights are there and differ, and takes from it
        # whether the decoder's output is scaled, where `scale_decoder_outputs` is not there.
        "tie_word_embeddings": model.tie_embeddings == "all",
        "scale_decoder_outputs": model.scale_logits,
    }
    if model.n_encoder_layers != model.n_decoder_layers:
        # `generate` makes a cache of as many layers as this says, or the encoder has: T5's own field is not asked for.
        fields["decoder_layers"] = model.n_decoder_layers
    return fields


def _t5_model(config: Mapping[str, Any]) -> Fields:
    scaled = config.get("scale_decoder_outputs")
    if scaled is None:
        scaled = config.get("model_type") == "t5" and config.get("tie_word_embeddings") is not False
    dropout = float(config["dropout_rate"])
    return {
        "n_encoder_layers": config["num_layers"],
        "n_decoder_layers": config.get("num_decoder_layers") or config["num_layers"],
        "d_model": config["d_model"],
        "d_ff": config["d_ff"],
        "n_heads": config["num_heads"],
        "head_dim": config["d_kv"],
        "positions": "relative_bias",
        "relative_buckets": config["relative_attention_num_buckets"],
        "relative_max_distance": config["relative_attention_max_distance"],
        "norm": "rms_norm",
        "norm_position": "pre",
        "norm_eps": config["layer_norm_epsilon"],
        "ffn": _activation(str(config["feed_forward_proj"]), _T5_FFN),
        "bias": False,
        "scale_attention": False,
        "scale_embeddings": False,
        "scale_logits": bool(scaled),
        "dropout": dropout,
        "init": "t5",
    }


def _bart_fields(model: ModelConfig) -> Fields:
    encoder, decoder = model.stack("encoder"), model.stack("decoder")
    fields = {
        "vocab_size": model.vocab_size,
        "d_model": encoder.d_model,
        "encoder_layers": encoder.n_layers,
        "decoder_layers": decoder.n_layers,
        "encoder_attention_heads": encoder.n_heads,
        "decoder_attention_heads": decoder.n_heads,
        "encoder_ffn_dim": encoder.d_ff,
        "decoder_ffn_dim": decoder.d_ff,
        "max_position_embeddings": model.max_positions,
        "activation_function": _BART_FFN[model.ffn],
        "dropout": model.dropout,
        "attention_dropout": model.dropout if model.attention_dropout is None else model.attention_dropout,
        "activation_dropout": model.dropout if model.ffn_dropout is None else model.ffn_dropout,
        "scale_embedding": model.scale_embeddings,
        "tie_word_embeddings": model.tie_embeddings == "all",
        # Not its own defaults, which are ids of its own tokenizer.
        "forced_eos_token_id": None,
    }
    if model.positions == "sinusoidal" and model.norm_position == "post" and model.tie_embeddings == "none":
        fields |= {"share_encoder_decoder_embeddings": False, "decoder_vocab_size": model.vocab_size}
    return fields


def _bart_model(config: Mapping[str, Any]) -> Fields:
    name = config["model_type"]
    sides: tuple[Side, Side] = ("encoder", "decoder")
    overrides = {
        side: {"d_ff": config[f"{side}_ffn_dim"], "n_heads": config[f"{side}_attention_heads"]}
        for side in sides
    }
    fields: Fields = {
        "n_encoder_layers": config["encoder_layers"],
        "n_decoder_layers": config["decoder_layers"],
        "d_model": config["d_model"],
        "d_ff": overrides["encoder"]["d_ff"],
        "n_heads": overrides["encoder"]["n_heads"],
        "max_positions": config["max_position_embeddings"],
        "ffn": _activation(str(config["activation_function"]), _BART_FFN),
        "bias": True,
        "scale_attention": True,
        "scale_embeddings": bool(config["scale_embedding"]),
        "dropout": float(config["dropout"]),
        "attention_dropout": float(config["attention_dropout"]),
        "ffn_dropout": float(config["activation_dropout"]),
        "init": "normal",
        **{key: value for key, value in FAMILIES[name].needs.items() if not isinstance(value, tuple)},
    }
    if overrides["encoder"] != overrides["decoder"]:
        fields["decoder"] = overrides["decoder"]
    return fields


def _activation(name: str, known: Mapping[str, str]) -> str:
    """Our name of an activation.

    Raises:
        ConfigError: there is none.
    """
    name = _ALIASES.get(name, name)
    for ours, theirs in known.items():
        if theirs == name:
            return ours
    raise ConfigError(f"its activation {name} cannot be imported: there are {', '.join(known.values())}")


_T5 = Family(
    "t5",
    "T5ForConditionalGeneration",
    {
        "positions": "relative_bias",
        "norm": "rms_norm",
        "norm_position": "pre",
        "norm_embeddings": False,
        "qk_norm": False,
        "bias": False,
        "scale_attention": False,
        "scale_embeddings": False,
        "tie_embeddings": ("all", "inputs"),
    },
    ("d_model", "d_ff", "n_heads", "head_dim"),
    lambda model: T5_GATED if model.ffn.endswith(("glu", "glu_tanh")) else T5_PLAIN,
    _t5_fields,
    _t5_model,
    ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"),
)


def _bart_like(name: str, architecture: str, positions: str, norm_position: str) -> Family:
    return Family(
        name,
        architecture,
        {
            "positions": positions,
            "norm_position": norm_position,
            "norm_embeddings": positions == "learned",
            "norm": "layer_norm",
            "norm_eps": 1e-5,
            "qk_norm": False,
            "bias": True,
            "scale_attention": True,
            "scale_logits": False,
            "ffn": tuple(_BART_FFN),
        },
        ("d_model",),
        lambda model: BART,
        _bart_fields,
        _bart_model,
        (
            "model.shared.weight",
            "model.encoder.embed_tokens.weight",
            "model.decoder.embed_tokens.weight",
            "lm_head.weight",
        ),
    )


FAMILIES: Mapping[str, Family] = {
    "t5": _T5,
    "marian": _bart_like("marian", "MarianMTModel", "sinusoidal", "post"),
    "pegasus": _bart_like("pegasus", "PegasusForConditionalGeneration", "sinusoidal", "pre"),
    "bart": _bart_like("bart", "BartForConditionalGeneration", "learned", "post"),
    "mbart": _bart_like("mbart", "MBartForConditionalGeneration", "learned", "pre"),
}
"""At most one of them fits a model."""
