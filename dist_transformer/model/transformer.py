"""The encoder-decoder Transformer: embeddings, encoder, decoder, output projection (the paper, figure 1)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_transformer.config import ModelConfig, StackConfig
from dist_transformer.model.cache import KeyValueCache
from dist_transformer.model.decoder import Decoder
from dist_transformer.model.encoder import Encoder


class Embedding(nn.Module):
    """Tokens to scaled vectors (the paper, section 3.4)."""

    def __init__(self, model: ModelConfig, stack: StackConfig, vocab_size: int) -> None:
        super().__init__()
        self.scale = math.sqrt(stack.d_model) if model.scale_embeddings else 1.0
        self.weight = nn.Parameter(torch.empty(vocab_size, stack.d_model))

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """[B, T] token ids to [B, T, D]."""
        return self.scaled(F.embedding(tokens_BT, self.weight))

    def scaled(self, x_BTD: Tensor) -> Tensor:
        """Rows of the matrix [B, T, D] as the stack reads them."""
        return x_BTD if self.scale == 1.0 else x_BTD * self.scale


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

    @property
    def max_positions(self) -> int | None:
        """The longest source or target that it takes: the rows of a learned table; None: any."""
        return self.config.max_positions if self.config.positions == "learned" else None

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return self.output_weight.device

    def encode(self, tokens_BS: Tensor, segment_ids_BS: Tensor, positions_BS: Tensor) -> Tensor:
        """Source tokens to memory [B, S, D]."""
        x_BSD = self.source_embedding(tokens_BS)
        memory_BSD: Tensor = self.encoder(x_BSD, segment_ids_BS, positions_BS)
        return memory_BSD

    def embed_target(self, tokens_BT: Tensor) -> Tensor:
        """Target tokens to vectors [B, T, D]."""
        embedding = self.source_embedding if self.target_embedding is None else self.target_embedding
        x_BTD: Tensor = embedding(tokens_BT)
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
        x_BTD = self.embed_target(decoder_input_tokens)
        hidden_BTD: Tensor = self.decoder(
            x_BTD, decoder_segment_ids, decoder_positions, memory_BSD, encoder_segment_ids
        )
        return hidden_BTD

    def logits(self, hidden_BTD: Tensor) -> Tensor:
        """Hidden states to scores over the vocabulary [B, T, V]."""
        return F.linear(hidden_BTD, self.output_weight)

    def start(self, tokens_BS: Tensor) -> KeyValueCache:
        """Encode padded sources [B, S] (0 is padding), one to a row, and prepare for decoding."""
        segment_ids_BS = (tokens_BS != 0).int()
        positions_BS = torch.arange(tokens_BS.shape[1], device=tokens_BS.device).expand_as(tokens_BS)
        memory_BSD = self.encode(tokens_BS, segment_ids_BS, positions_BS)
        return self.decoder.start(memory_BSD, segment_ids_BS)

    def step(self, tokens_RT: Tensor, cache: KeyValueCache) -> Tensor:
        """The next T target tokens of every hypothesis to the scores [R, T, V] of what follows each."""
        return self.logits(self.decoder.step(self.embed_target(tokens_RT), cache))


def build_model(config: ModelConfig) -> EncoderDecoder:
    """The model on the meta device: shapes and names without memory; `initialize` gives it weights."""
    with torch.device("meta"):
        return EncoderDecoder(config)
