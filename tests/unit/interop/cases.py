"""Small models that fit a family, and the inputs and logits that show whether two models are the same."""

from typing import Any

import torch
from torch import Tensor

from dist_transformer.data.token_ids import EOS_ID, PAD_ID
from dist_transformer.data.tokenizer import TextTokenizer
from dist_transformer.model import EncoderDecoder
from tests.unit.model.small import small_model

N_VOCAB = 448
"""Rows of the matrices: some more than the tokenizer has ids."""

_BART: dict[str, Any] = {"positions": "learned", "norm_embeddings": True, "scale_embeddings": False}

FITS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "t5_v1_1": ("t5", "t5_v1_1_small", {}),
    "t5_tied": ("t5", "t5_v1_1_small", {"tie_embeddings": "all", "scale_logits": True, "ffn": "relu"}),
    "t5_tied_unscaled": ("t5", "t5_v1_1_small", {"tie_embeddings": "all", "ffn": "geglu"}),
    "t5_depths": ("t5", "t5_v1_1_small", {"n_encoder_layers": 1, "n_decoder_layers": 2, "head_dim": 4}),
    "marian": ("marian", "vaswani2017_base", {"n_decoder_layers": 1}),
    "marian_own_output": ("marian", "vaswani2017_base", {"tie_embeddings": "inputs", "ffn": "gelu_tanh"}),
    "marian_three": (
        "marian",
        "vaswani2017_base",
        {"tie_embeddings": "none", "head_dim": None, "decoder": {"d_ff": 40, "n_heads": 2}},
    ),
    "pegasus": ("pegasus", "vaswani2017_base", {"norm_position": "pre"}),
    "bart": ("bart", "vaswani2017_base", {**_BART, "ffn": "gelu"}),
    "bart_own_output": ("bart", "vaswani2017_base", {**_BART, "tie_embeddings": "inputs"}),
    "mbart": ("mbart", "vaswani2017_base", {**_BART, "norm_position": "pre", "scale_embeddings": True}),
}
"""Family, preset, what differs from it."""


def model_of(case: str) -> EncoderDecoder:
    """A small model with random weights, padding's row included."""
    _, preset, fields = FITS[case]
    sizes = {"vocab_size": N_VOCAB, "max_positions": 64, "head_dim": 8}
    return small_model(preset, **{**sizes, **fields})


def train_tokenizer() -> TextTokenizer:
    """A byte-level tokenizer of a few more ids than bytes and special tokens."""
    return TextTokenizer.train(iter(["a fox jumps over the dog, and the dog over the fox"] * 3), 380)


def sources_and_targets() -> tuple[Tensor, Tensor]:
    """Sources [B, S] ended by EOS and padded, and decoder inputs [B, T] that begin with padding."""
    generator = torch.Generator().manual_seed(1)
    source = torch.randint(3, 370, (4, 11), generator=generator)
    for row, length in enumerate((10, 7, 3, 1)):
        source[row, length], source[row, length + 1 :] = EOS_ID, PAD_ID
    target = torch.randint(3, 370, (4, 9), generator=generator)
    target[:, 0] = PAD_ID
    return source, target


@torch.no_grad()
def our_logits(model: EncoderDecoder, source: Tensor, target: Tensor) -> Tensor:
    """[B, T, V]."""
    places = torch.arange(16).expand(len(source), -1)
    hidden = model(
        source,
        (source != PAD_ID).int(),
        places[:, : source.shape[1]],
        target,
        torch.ones_like(target),
        places[:, : target.shape[1]],
    )
    logits: Tensor = model.logits(hidden)
    return logits


@torch.no_grad()
def their_logits(theirs: Any, source: Tensor, target: Tensor, pad: int = PAD_ID) -> Tensor:
    """[B, T, V]."""
    mask = (source != pad).long()
    logits: Tensor = theirs(input_ids=source, attention_mask=mask, decoder_input_ids=target).logits
    return logits


def error(found: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the spread of what is expected."""
    assert expected.std() > 0.01
    return float((found - expected).abs().max() / expected.std())
