"""The encoder-decoder in plain PyTorch: knows no rank, no engine, no file.

Shape legend, used as suffixes (`q_BHTK`): B rows, S source positions, T target (or query) positions, D d_model,
F d_ff, H heads, K head_dim, V vocabulary. Letters are logical: a name keeps its letters when a tensor is sharded.
"""

from dist_transformer.model.initialize import initialize
from dist_transformer.model.transformer import EncoderDecoder, build_model

__all__ = ["EncoderDecoder", "build_model", "initialize"]
