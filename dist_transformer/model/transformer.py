"""The encoder-decoder Transformer: embeddings, encoder, decoder, output projection (the paper, figure 1)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_transformer.config import ModelConfig, StackConfig
from dist_transformer.model.cache import KeyValueCache
from dist_transformer.model.decoder import Decoder
from dist_transformer.model.encoder import Encoder
from dist_transformer.model.positions import LearnedPositions, sinusoid_table


class Embedding(nn.Module):
    """Tokens and, where they are added, positions, to vectors (the paper, sections 3.4 and 3.5)."""

    def __init__(self, model: ModelConfig, stack: StackConfig, vocab_size: int) -> None:
        super().__init__()
        self.config, self.dropout = model, stack.dropout
        self.scale = math.sqrt(stack.d_model) if model.scale_embeddings else 1.0
        self.weight = nn.Parameter(torch.empty(vocab_size, stack.d_model))
        self.learned = (
            LearnedPositions(model.max_positions, stack.d_model) if model.positions == "learned" else None
        )

    def forward(self, tokens_BT: Tensor, positions_BT: Tensor, length: int) -> Tensor:
        """[B, T] token ids and positions below `length` to [B, T, D]."""
        return self.add_positions(F.embedding(tokens_BT, self.weight), positions_BT, length)

    def add_positions(self, x_BTD: Tensor, positions_BT: Tensor, length: int) -> Tensor:
        """Scaled vectors of tokens [B, T, D], with their positions where those are added, and dropout."""
        if self.scale != 1.0:
            x_BTD = x_BTD * self.scale
        if self.learned is not None:
            x_BTD = x_BTD + self.learned(positions_BT)
        elif self.config.positions == "sinusoidal":
            table = sinusoid_table(length, x_BTD.shape[-1], x_BTD.device)
            x_BTD = x_BTD + F.embedding(positions_BT, table.to(x_BTD.dtype))
        return F.dropout(x_BTD, self.dropout, self.training)


class EncoderDecoder(nn.Module):
    """The whole model. `forward` gives hidden states; `logits` projects them, so that a loss can do it in chunks.

    Raises:
        ValueError: if the configuration leaves `vocab_size` open.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        if config.vocab_size is None:
            raise ValueError("model.vocab_size must be known before the model is built")
        self.config, self.vocab_size = config, config.vocab_size
        encoder, decoder = config.stack("encoder"), config.stack("decoder")
        self.source_embedding = Embedding(config, encoder, self.vocab_size)
        # None where it is the source's: registered twice, it would stand twice in every state dict.
        self.target_embedding = (
            Embedding(config, decoder, self.vocab_size) if config.tie_embeddings == "none" else None
        )
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.output = (
            None
            if config.tie_embeddings == "all"
            else nn.Linear(decoder.d_model, self.vocab_size, bias=False)
        )

    @property
    def output_weight(self) -> Tensor:
        """The output projection [V, D]."""
        return self.source_embedding.weight if self.output is None else self.output.weight

    def encode(self, tokens_BS: Tensor, segment_ids_BS: Tensor, positions_BS: Tensor) -> Tensor:
        """Source tokens to memory [B, S, D]."""
        x_BSD = self.source_embedding(tokens_BS, positions_BS, tokens_BS.shape[1])
        memory_BSD: Tensor = self.encoder(x_BSD, segment_ids_BS, positions_BS)
        return memory_BSD

    def embed_target(self, tokens_BT: Tensor, positions_BT: Tensor, length: int) -> Tensor:
        """Target tokens, at positions below `length`, to vectors [B, T, D]."""
        embedding = self.source_embedding if self.target_embedding is None else self.target_embedding
        x_BTD: Tensor = embedding(tokens_BT, positions_BT, length)
        return x_BTD

    def forward(
        self,
        encoder_input_tokens: Tensor,
        encoder_segment_ids: Tensor,
        encoder_positions: Tensor,
        decoder_input_tokens: Tensor,
        decoder_segment_ids: Tensor,
        decoder_positions: Tensor,
    ) -> Tensor:
        """Rows of packed samples to the decoder's hidden states [B, T, D]; see `data.batch.Batch` for the inputs."""
        memory_BSD = self.encode(encoder_input_tokens, encoder_segment_ids, encoder_positions)
        x_BTD = self.embed_target(decoder_input_tokens, decoder_positions, decoder_input_tokens.shape[1])
        hidden_BTD: Tensor = self.decoder(
            x_BTD, decoder_segment_ids, decoder_positions, memory_BSD, encoder_segment_ids
        )
        return hidden_BTD

    def logits(self, hidden_BTD: Tensor) -> Tensor:
        """Hidden states to scores over the vocabulary [B, T, V]."""
        return F.linear(hidden_BTD, self.output_weight)

    def start(self, tokens_BS: Tensor, max_len: int) -> KeyValueCache:
        """Encode padded sources [B, S] (0 is padding), one to a row, and prepare for decoding `max_len` tokens."""
        segment_ids_BS = (tokens_BS != 0).int()
        positions_BS = torch.arange(tokens_BS.shape[1], device=tokens_BS.device).expand_as(tokens_BS)
        memory_BSD = self.encode(tokens_BS, segment_ids_BS, positions_BS)
        return self.decoder.start(memory_BSD, segment_ids_BS, max_len)

    def step(self, tokens_BT: Tensor, cache: KeyValueCache) -> Tensor:
        """The next T target tokens of every row to the scores [B, T, V] of what follows each."""
        n_before, n_new = cache.length, tokens_BT.shape[1]
        positions_BT = torch.arange(n_before, n_before + n_new, device=tokens_BT.device).expand_as(tokens_BT)
        x_BTD = self.embed_target(tokens_BT, positions_BT, n_before + n_new)
        return self.logits(self.decoder.step(x_BTD, cache))


def build_model(config: ModelConfig) -> EncoderDecoder:
    """The model on the meta device: shapes and names without memory; `initialize` gives it weights."""
    with torch.device("meta"):
        return EncoderDecoder(config)
