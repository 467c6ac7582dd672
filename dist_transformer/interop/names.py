"""Parameter names here and in Hugging Face's classes: one table a family, read in both directions.

A row is (our module, their module). `{side}` is encoder or decoder, `{i}` the layer, `{x}` one of q, k, v; `{last}` is
T5's number of the last sublayer. Matrices over the vocabulary are not in the tables: `tie_embeddings` decides which of
those are one, see `Family`.
"""

from collections.abc import Iterable, Iterator

from dist_transformer.config import ModelConfig

Table = tuple[tuple[str, str], ...]

T5: Table = (
    ("{side}.relative_bias", "{side}.block.0.layer.0.SelfAttention.relative_attention_bias"),
    ("{side}.final_norm", "{side}.final_layer_norm"),
    ("{side}.layers.{i}.self_attention.{x}_proj", "{side}.block.{i}.layer.0.SelfAttention.{x}"),
    ("{side}.layers.{i}.self_attention.o_proj", "{side}.block.{i}.layer.0.SelfAttention.o"),
    ("{side}.layers.{i}.self_attention_residual.norm", "{side}.block.{i}.layer.0.layer_norm"),
    ("decoder.layers.{i}.cross_attention.{x}_proj", "decoder.block.{i}.layer.1.EncDecAttention.{x}"),
    ("decoder.layers.{i}.cross_attention.o_proj", "decoder.block.{i}.layer.1.EncDecAttention.o"),
    ("decoder.layers.{i}.cross_attention_residual.norm", "decoder.block.{i}.layer.1.layer_norm"),
    ("{side}.layers.{i}.feed_forward_residual.norm", "{side}.block.{i}.layer.{last}.layer_norm"),
    ("{side}.layers.{i}.feed_forward.down", "{side}.block.{i}.layer.{last}.DenseReluDense.wo"),
)
"""T5 numbers the sublayers of a block; the feed-forward is the last."""
T5_PLAIN: Table = (
    *T5,
    ("{side}.layers.{i}.feed_forward.up", "{side}.block.{i}.layer.{last}.DenseReluDense.wi"),
)
T5_GATED: Table = (
    *T5,
    ("{side}.layers.{i}.feed_forward.gate", "{side}.block.{i}.layer.{last}.DenseReluDense.wi_0"),
    ("{side}.layers.{i}.feed_forward.up", "{side}.block.{i}.layer.{last}.DenseReluDense.wi_1"),
)
BART: Table = (
    ("{side}.input.norm", "model.{side}.layernorm_embedding"),
    ("{side}.input.learned", "model.{side}.embed_positions"),
    ("{side}.final_norm", "model.{side}.layer_norm"),
    ("{side}.layers.{i}.self_attention.{x}_proj", "model.{side}.layers.{i}.self_attn.{x}_proj"),
    ("{side}.layers.{i}.self_attention.o_proj", "model.{side}.layers.{i}.self_attn.out_proj"),
    ("{side}.layers.{i}.self_attention_residual.norm", "model.{side}.layers.{i}.self_attn_layer_norm"),
    ("decoder.layers.{i}.cross_attention.{x}_proj", "model.decoder.layers.{i}.encoder_attn.{x}_proj"),
    ("decoder.layers.{i}.cross_attention.o_proj", "model.decoder.layers.{i}.encoder_attn.out_proj"),
    ("decoder.layers.{i}.cross_attention_residual.norm", "model.decoder.layers.{i}.encoder_attn_layer_norm"),
    ("{side}.layers.{i}.feed_forward.up", "model.{side}.layers.{i}.fc1"),
    ("{side}.layers.{i}.feed_forward.down", "model.{side}.layers.{i}.fc2"),
    ("{side}.layers.{i}.feed_forward_residual.norm", "model.{side}.layers.{i}.final_layer_norm"),
)
"""Marian, Pegasus, BART and mBART are one layout: each has those of these modules that its architecture has."""

EMBEDDINGS = ("source_embedding.weight", "target_embedding.weight", "output.weight")
"""Our matrices over the vocabulary; the last two only where they are not the first."""


def match_names(table: Table, model: ModelConfig, ours: Iterable[str]) -> dict[str, str]:
    """Our parameters, those over the vocabulary left out, to theirs.

    Raises:
        KeyError: of a parameter that stands in no row: the model's architecture is another.
    """
    modules = dict(_modules(table, model))
    found = {}
    for name in ours:
        if name not in EMBEDDINGS:
            module, _, kind = name.rpartition(".")
            found[name] = f"{modules[module]}.{kind}"
    return found


def _modules(table: Table, model: ModelConfig) -> Iterator[tuple[str, str]]:
    """Every row for every side, layer and projection."""
    for ours, theirs in table:
        for side, n_layers, last in (
            ("encoder", model.n_encoder_layers, 1),
            ("decoder", model.n_decoder_layers, 2),
        ):
            for i in range(n_layers if "{i}" in ours else 1):
                for x in "qkv" if "{x}" in ours else "-":
                    fields = {"side": side, "i": i, "x": x, "last": last}
                    yield ours.format(**fields), theirs.format(**fields)
