"""The shape of an encoder-decoder: every architectural choice, and how they compose."""

from typing import Literal, Self

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from dist_transformer.config.base import Section

Side = Literal["encoder", "decoder"]


class StackOverrides(Section):
    """Fields of one stack that differ from the model's; null means "as the model"."""

    d_model: PositiveInt | None = None
    """Width of this stack's residual stream. Cross-attention projects from one width to the other."""
    d_ff: PositiveInt | None = None
    """Inner width of this stack's feed-forward."""
    n_heads: PositiveInt | None = None
    """Query heads of this stack."""
    n_kv_heads: PositiveInt | None = None
    """Key-value heads of this stack."""
    head_dim: PositiveInt | None = None
    """Width of one head in this stack."""
    dropout: float | None = Field(default=None, ge=0, lt=1)
    """Residual dropout of this stack."""


class StackConfig(Section):
    """One stack (encoder or decoder) with nothing left open: what `model/` builds from."""

    side: Side
    """Which stack this is."""
    n_layers: NonNegativeInt
    """Number of layers."""
    d_model: PositiveInt
    """Width of the residual stream."""
    d_memory: PositiveInt
    """Width of the encoder's output, which the decoder attends to (equal to `d_model` in an encoder)."""
    d_ff: PositiveInt
    """Inner width of the feed-forward."""
    n_heads: PositiveInt
    """Query heads."""
    n_kv_heads: PositiveInt
    """Key-value heads; fewer than `n_heads` is grouped-query attention, 1 is multi-query."""
    head_dim: PositiveInt
    """Width of one head."""
    dropout: float
    """Dropout on embeddings and on each sublayer's output."""


class ModelConfig(Section):
    """The encoder-decoder. `preset` is applied first, then single fields over it."""

    preset: str | None = None
    """Name of a file in `configs/model/`, such as `t5_v1_1_base`; `dist-transformer presets` lists them."""
    vocab_size: PositiveInt | None = None
    """Rows of the embedding; null: the tokenizer's size, rounded up to `pad_vocab_to`."""
    pad_vocab_to: PositiveInt = 64
    """The embedding's rows are rounded up to a multiple of this, for fast kernels and tensor parallelism."""
    n_encoder_layers: NonNegativeInt = 6
    """Encoder layers."""
    n_decoder_layers: PositiveInt = 6
    """Decoder layers."""
    d_model: PositiveInt = 512
    """Width of the residual stream."""
    d_ff: PositiveInt = 2048
    """Inner width of the feed-forward (of each half, where it is gated)."""
    n_heads: PositiveInt = 8
    """Query heads."""
    n_kv_heads: PositiveInt | None = None
    """Key-value heads (grouped-query attention); null: as many as `n_heads`."""
    head_dim: PositiveInt | None = None
    """Width of one head; null: d_model / n_heads."""
    encoder: StackOverrides = StackOverrides()
    """Fields that differ in the encoder."""
    decoder: StackOverrides = StackOverrides()
    """Fields that differ in the decoder."""
    positions: Literal["sinusoidal", "learned", "relative_bias", "rotary", "none"] = "sinusoidal"
    """How positions enter: added to embeddings (sinusoidal, learned), T5's bias on scores, or rotated q and k."""
    max_positions: PositiveInt = 2048
    """Rows of a learned position table; each stack has its own."""
    relative_buckets: PositiveInt = 32
    """Buckets of T5's relative bias."""
    relative_max_distance: PositiveInt = 128
    """Distance from which T5's relative bias is one bucket."""
    rope_theta: float = Field(default=10000.0, gt=0)
    """Base of the rotary frequencies."""
    norm: Literal["layer_norm", "rms_norm"] = "layer_norm"
    """Normalisation: with mean, gain and bias, or by root mean square with a gain."""
    norm_position: Literal["post", "pre"] = "post"
    """Post: norm(x + f(x)) (the paper); pre: x + f(norm(x)), with a final norm."""
    norm_eps: float = Field(default=1e-5, gt=0)
    """Epsilon of every norm."""
    norm_embeddings: bool = False
    """Normalise what enters each stack, after positions are added (BART)."""
    qk_norm: bool = False
    """Root-mean-square norm of queries and keys, each head by itself, before the scores."""
    ffn: Literal["relu", "gelu", "gelu_tanh", "silu", "reglu", "geglu", "geglu_tanh", "swiglu"] = "relu"
    """Feed-forward: an activation, or a gated pair (…glu)."""
    bias: bool = True
    """Biases in every linear layer of attention and feed-forward."""
    scale_attention: bool = True
    """Divide scores by sqrt(head_dim); T5 does not."""
    scale_embeddings: bool = True
    """Multiply embeddings by sqrt(d_model) (the paper, section 3.4); T5 does not."""
    scale_logits: bool = False
    """Divide the decoder's output by sqrt(d_model) before the output projection (T5 1.0 with tied embeddings)."""
    tie_embeddings: Literal["all", "inputs", "none"] = "all"
    """Shared matrices: source, target and output (the paper); source and target only (T5 v1.1); none."""
    dropout: float = Field(default=0.1, ge=0, lt=1)
    """Dropout on embeddings and on each sublayer's output."""
    attention_dropout: float | None = Field(default=None, ge=0, lt=1)
    """Dropout on attention weights; null: as `dropout`."""
    ffn_dropout: float | None = Field(default=None, ge=0, lt=1)
    """Dropout inside the feed-forward, after the activation; null: as `dropout`."""
    init: Literal["xavier", "t5", "normal"] = "xavier"
    """Initial weights: Glorot uniform (the paper's code), T5's fan-in scheme, or N(0, 0.02), less for outputs."""

    def stack(self, side: Side) -> StackConfig:
        """The encoder's or the decoder's full shape, with overrides applied and nulls filled in."""
        over = self.encoder if side == "encoder" else self.decoder
        d_model = over.d_model or self.d_model
        n_heads = over.n_heads or self.n_heads
        head_dim = over.head_dim or self.head_dim or d_model // n_heads
        return StackConfig(
            side=side,
            n_layers=self.n_encoder_layers if side == "encoder" else self.n_decoder_layers,
            d_model=d_model,
            d_memory=self.encoder.d_model or self.d_model,
            d_ff=over.d_ff or self.d_ff,
            n_heads=n_heads,
            n_kv_heads=over.n_kv_heads or self.n_kv_heads or n_heads,
            head_dim=head_dim,
            dropout=self.dropout if over.dropout is None else over.dropout,
        )

    @model_validator(mode="after")
    def _shapes_fit(self) -> Self:
        problems = [problem for side in ("encoder", "decoder") for problem in self._stack_problems(side)]
        widths = {self.stack("encoder").d_model, self.stack("decoder").d_model}
        if len(widths) > 1 and self.tie_embeddings != "none":
            problems.append(
                f"tie_embeddings={self.tie_embeddings} needs one d_model for both stacks, "
                f"not {sorted(widths)}: set tie_embeddings: none"
            )
        if problems:
            raise ValueError("; ".join(dict.fromkeys(problems)))
        return self

    def _stack_problems(self, side: Side) -> list[str]:
        over = self.encoder if side == "encoder" else self.decoder
        stack = self.stack(side)
        problems = []
        if (over.head_dim or self.head_dim) is None and stack.d_model % stack.n_heads:
            fits = [n for n in (1, 2, 4, 8, 12, 16, 32, 64) if stack.d_model % n == 0 and n <= stack.d_model]
            near = sorted(sorted(fits, key=lambda n: abs(n - stack.n_heads))[:2])
            problems.append(
                f"n_heads={stack.n_heads} does not divide d_model={stack.d_model}: "
                f"try {' or '.join(map(str, near))}, or set head_dim"
            )
        if stack.n_heads % stack.n_kv_heads:
            problems.append(
                f"n_kv_heads={stack.n_kv_heads} does not divide n_heads={stack.n_heads}: "
                f"try {' or '.join(str(n) for n in range(1, stack.n_heads + 1) if stack.n_heads % n == 0)}"
            )
        if self.positions == "rotary" and stack.head_dim % 2:
            problems.append(f"rotary positions need an even head_dim, not {stack.head_dim}")
        if self.positions == "sinusoidal" and stack.d_model % 2:
            problems.append(f"sinusoidal positions need an even d_model, not {stack.d_model}")
        return problems
