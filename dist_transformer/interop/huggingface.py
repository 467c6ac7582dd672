"""Hugging Face's parameter names for ours: T5 v1.1 (`T5ForConditionalGeneration`) and Marian (`MarianMTModel`)."""

import re
from collections.abc import Mapping

from torch import Tensor

from dist_transformer.errors import UserError

# (our name, Hugging Face's name); {i} is the layer. T5 numbers the sublayers of a block, Marian names them.
_T5 = [
    ("source_embedding", "shared"),
    ("output", "lm_head"),
    ("{side}.relative_bias", "{side}.block.0.layer.0.SelfAttention.relative_attention_bias"),
    ("{side}.final_norm", "{side}.final_layer_norm"),
    ("{side}.layers.{i}.self_attention.{x}_proj", "{side}.block.{i}.layer.0.SelfAttention.{x}"),
    ("{side}.layers.{i}.self_attention_residual.norm", "{side}.block.{i}.layer.0.layer_norm"),
    ("decoder.layers.{i}.cross_attention.{x}_proj", "decoder.block.{i}.layer.1.EncDecAttention.{x}"),
    ("decoder.layers.{i}.cross_attention_residual.norm", "decoder.block.{i}.layer.1.layer_norm"),
    ("{side}.layers.{i}.feed_forward.gate", "{side}.block.{i}.layer.{last}.DenseReluDense.wi_0"),
    ("{side}.layers.{i}.feed_forward.up", "{side}.block.{i}.layer.{last}.DenseReluDense.wi_1"),
    ("{side}.layers.{i}.feed_forward.down", "{side}.block.{i}.layer.{last}.DenseReluDense.wo"),
    ("{side}.layers.{i}.feed_forward_residual.norm", "{side}.block.{i}.layer.{last}.layer_norm"),
]
_MARIAN = [
    ("source_embedding", "model.shared"),
    ("{side}.layers.{i}.self_attention.o_proj", "model.{side}.layers.{i}.self_attn.out_proj"),
    ("{side}.layers.{i}.self_attention.{x}_proj", "model.{side}.layers.{i}.self_attn.{x}_proj"),
    ("{side}.layers.{i}.self_attention_residual.norm", "model.{side}.layers.{i}.self_attn_layer_norm"),
    ("decoder.layers.{i}.cross_attention.o_proj", "model.decoder.layers.{i}.encoder_attn.out_proj"),
    ("decoder.layers.{i}.cross_attention.{x}_proj", "model.decoder.layers.{i}.encoder_attn.{x}_proj"),
    ("decoder.layers.{i}.cross_attention_residual.norm", "model.decoder.layers.{i}.encoder_attn_layer_norm"),
    ("{side}.layers.{i}.feed_forward.up", "model.{side}.layers.{i}.fc1"),
    ("{side}.layers.{i}.feed_forward.down", "model.{side}.layers.{i}.fc2"),
    ("{side}.layers.{i}.feed_forward_residual.norm", "model.{side}.layers.{i}.final_layer_norm"),
]
_FAMILIES = {"t5": _T5, "marian": _MARIAN}


def huggingface_name(ours: str, family: str) -> str:
    """Hugging Face's name of one of our parameters.

    Args:
        family: `t5` or `marian`.

    Raises:
        UserError: if the family has no such parameter: the architecture is another.
    """
    module, kind = ours.rsplit(".", 1)
    for pattern, theirs in _FAMILIES[family]:
        groups = {"side": "encoder|decoder", "i": r"\d+", "x": "[qkvo]"}
        regex = re.escape(pattern)
        for key, group in groups.items():
            regex = regex.replace(rf"\{{{key}\}}", f"(?P<{key}>{group})", 1)
        match = re.fullmatch(regex, module)
        if match:
            fields = {"side": "decoder", **match.groupdict()}
            last = 1 if fields["side"] == "encoder" else 2
            return f"{theirs.format(**fields, last=last)}.{kind}"
    raise UserError(
        f"{ours}: Hugging Face's {family} has no such parameter: its architecture differs from this model's"
    )


def from_huggingface(theirs: Mapping[str, Tensor], our_names: list[str], family: str) -> dict[str, Tensor]:
    """Hugging Face's state dict in our names.

    Raises:
        UserError: if a parameter is missing on either side.
    """
    ours = {}
    for name in our_names:
        other = huggingface_name(name, family)
        if other not in theirs:
            raise UserError(f"{other}: missing in the Hugging Face weights, needed for {name}")
        ours[name] = theirs[other]
    return ours
