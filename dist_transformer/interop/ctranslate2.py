"""Export to CTranslate2, through its own model specification and converter.

Its loaders of Hugging Face's classes are not used: that of Marian starts the decoder from a zero vector and drops the
last token, that of T5 scales the output of what transformers 5 calls tied, which is every T5. The specification knows
more architectures than Hugging Face has classes: grouped-query attention and rotary positions too.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dist_transformer.config import ModelConfig
from dist_transformer.config.model import Side, StackConfig
from dist_transformer.data.tokenizer import TextTokenizer
from dist_transformer.errors import ConfigError
from dist_transformer.interop.folders import load_package
from dist_transformer.interop.tokenizer import tokens_of, with_eos
from dist_transformer.model.positions import sinusoid_table

QUANTIZATIONS = (
    "int8",
    "int8_float32",
    "int8_float16",
    "int8_bfloat16",
    "int16",
    "float16",
    "bfloat16",
    "float32",
)

_ACTIVATIONS = {
    "relu": "RELU",
    "reglu": "RELU",
    "gelu": "GELU",
    "geglu": "GELU",
    "gelu_tanh": "GELUTanh",
    "geglu_tanh": "GELUTanh",
    "silu": "SWISH",
    "swiglu": "SWISH",
}


def export_ctranslate2(
    folder: Path,
    model: ModelConfig,
    weights: Mapping[str, Tensor],
    tokenizer: TextTokenizer,
    max_len: int,
    quantization: str | None = None,
) -> None:
    """Write a folder for `ctranslate2.Translator`, and the `tokenizer.json` that makes its tokens, EOS included.

    Rows of the vocabulary that no token has are left out.

    Args:
        folder: is there, and empty.
        max_len: positions that a table of fixed ones must have.
        quantization: one of `QUANTIZATIONS`; None: float32.

    Raises:
        ConfigError: `ctranslate2` is not installed, or has no such architecture or quantization.
    """
    if quantization is not None and quantization not in QUANTIZATIONS:
        raise ConfigError(f"--quantization {quantization}: there are {', '.join(QUANTIZATIONS)}")
    reason = misfit(model)
    if reason is not None:
        raise ConfigError(f"CTranslate2 has no such architecture: {reason}")
    load_package("ctranslate2")
    from ctranslate2.converters.converter import Converter

    spec = _Builder(model, weights, tokenizer.vocab_size, max_len).build()
    tokens = tokens_of(tokenizer)
    spec.register_source_vocabulary(tokens)
    spec.register_target_vocabulary(tokens)
    start, eos = tokens[tokenizer.pad_id], tokens[tokenizer.eos_id]
    spec.config.bos_token = spec.config.decoder_start_token = start
    spec.config.eos_token = eos
    spec.config.unk_token = eos if tokenizer.unk_id is None else tokens[tokenizer.unk_id]
    spec.config.layer_norm_epsilon = model.norm_eps

    class _Converter(Converter):  # type: ignore[misc]
        def _load(self) -> Any:
            return spec

    _Converter().convert(str(folder), quantization=quantization, force=True)
    (folder / "tokenizer.json").write_text(with_eos(tokenizer), encoding="utf-8")


def misfit(model: ModelConfig) -> str | None:
    """Why CTranslate2 cannot run this model, or None."""
    encoder, decoder = model.stack("encoder"), model.stack("decoder")
    if encoder.d_model != decoder.d_model:
        return f"encoder and decoder differ in d_model ({encoder.d_model} and {decoder.d_model})"
    return "model.qk_norm is true, and its cross-attention has no such norm" if model.qk_norm else None


class _Builder:
    """Fills a `TransformerSpec` from our weights."""

    def __init__(self, model: ModelConfig, weights: Mapping[str, Tensor], n_vocab: int, max_len: int) -> None:
        self.model, self.weights, self.n_vocab, self.max_len = model, weights, n_vocab, max_len

    def build(self) -> Any:
        from ctranslate2.specs import common_spec, transformer_spec

        options = {
            "pre_norm": self.model.norm_position == "pre",
            "activation": getattr(common_spec.Activation, _ACTIVATIONS[self.model.ffn]),
            "layernorm_embedding": self.model.norm_embeddings,
            "relative_attention_bias": self.model.positions == "relative_bias",
            "ffn_glu": self.model.ffn.endswith(("glu", "glu_tanh")),
            "rms_norm": self.model.norm == "rms_norm",
        }
        encoder, decoder = self.model.stack("encoder"), self.model.stack("decoder")
        spec = transformer_spec.TransformerSpec(
            transformer_spec.TransformerEncoderSpec(
                encoder.n_layers, encoder.n_heads, **options, **self._of_stack(encoder)
            ),
            transformer_spec.TransformerDecoderSpec(
                decoder.n_layers, decoder.n_heads, **options, **self._of_stack(decoder)
            ),
        )
        self._fill_stack(spec.encoder, "encoder")
        self._fill_stack(spec.decoder, "decoder")
        spec.encoder.embeddings[0].weight = self._of_vocabulary("source_embedding")
        spec.decoder.embeddings.weight = self._of_vocabulary("target_embedding", "source_embedding")
        spec.decoder.projection.weight = self._of_vocabulary("output", "source_embedding")
        if self.model.scale_logits:
            spec.decoder.scale_outputs = np.float32(decoder.d_model**-0.5)
        return spec

    def _of_stack(self, stack: StackConfig) -> dict[str, Any]:
        options: dict[str, Any] = {"head_dim": stack.head_dim}
        if stack.n_kv_heads != stack.n_heads:
            options["num_heads_kv"] = stack.n_kv_heads
        if self.model.positions == "rotary":
            options |= {
                "rotary_dim": stack.head_dim,
                "rotary_interleave": False,
                "rotary_base": self.model.rope_theta,
            }
        return options

    def _fill_stack(self, spec: Any, side: Side) -> None:
        spec.scale_embeddings = self.model.scale_embeddings
        if self.model.positions == "rotary":
            if hasattr(spec, "position_encodings"):
                delattr(spec, "position_encodings")
        elif self.model.positions != "relative_bias":
            spec.position_encodings.encodings = self._positions(side)
        if self.model.norm_embeddings:
            self._norm(spec.layernorm_embedding, f"{side}.input.norm")
        if self.model.norm_position == "pre":
            self._norm(spec.layer_norm, f"{side}.final_norm")
        for i, layer in enumerate(spec.layer):
            ours = f"{side}.layers.{i}"
            self._attention(layer.self_attention, f"{ours}.self_attention", side, "q k v", "o")
            if self.model.positions == "relative_bias":
                layer.self_attention.relative_attention_bias = self._tensor(f"{side}.relative_bias.weight")
                layer.self_attention.relative_attention_max_distance = np.int32(
                    self.model.relative_max_distance
                )
            if side == "decoder":
                self._attention(layer.attention, f"{ours}.cross_attention", side, "q", "k v", "o")
            self._feed_forward(layer.ffn, f"{ours}.feed_forward")

    def _positions(self, side: Side) -> Tensor:
        stack = self.model.stack(side)
        if self.model.positions == "learned":
            return self._tensor(f"{side}.input.learned.weight")
        if self.model.positions == "sinusoidal":
            return sinusoid_table(self.max_len, stack.d_model, torch.device("cpu"))
        return torch.zeros(self.max_len, stack.d_model)

    def _attention(self, spec: Any, ours: str, side: Side, *maps: str) -> None:
        """One of its linear maps for each of ours, or for several side by side."""
        spec.queries_scale = self.model.stack(side).head_dim ** -0.5 if self.model.scale_attention else 1.0
        for linear, names in zip(spec.linear, maps, strict=True):
            self._linear(linear, *(f"{ours}.{name}_proj" for name in names.split()))
        self._norm(spec.layer_norm, f"{ours}_residual.norm")

    def _feed_forward(self, spec: Any, ours: str) -> None:
        if f"{ours}.gate.weight" in self.weights:
            self._linear(spec.linear_0, f"{ours}.gate")
            self._linear(spec.linear_0_noact, f"{ours}.up")
        else:
            self._linear(spec.linear_0, f"{ours}.up")
        self._linear(spec.linear_1, f"{ours}.down")
        self._norm(spec.layer_norm, f"{ours}_residual.norm")

    def _linear(self, spec: Any, *modules: str) -> None:
        spec.weight = torch.cat([self._tensor(f"{module}.weight") for module in modules])
        if self.model.bias:
            spec.bias = torch.cat([self._tensor(f"{module}.bias") for module in modules])

    def _norm(self, spec: Any, module: str) -> None:
        spec.gamma = self._tensor(f"{module}.weight")
        if f"{module}.bias" in self.weights:
            spec.beta = self._tensor(f"{module}.bias")

    def _of_vocabulary(self, *modules: str) -> Tensor:
        """The first of these matrices that there is, its rows that tokens have."""
        module = next(module for module in modules if f"{module}.weight" in self.weights)
        return self._tensor(f"{module}.weight")[: self.n_vocab].contiguous()

    def _tensor(self, name: str) -> Tensor:
        return self.weights[name].detach().float().cpu()
