"""The `generate` section: how target text is searched for or drawn, in evaluation and by the command."""

from typing import Literal, Self

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from dist_transformer.config.base import Section


class GenerateConfig(Section):
    """How target text is searched for in evaluation and by `generate` (docs/decoding.md)."""

    beam_size: PositiveInt = 5
    """Hypotheses kept per source; 1 is greedy search."""
    length_penalty: float = Field(default=1.0, ge=-10, le=10)
    """Finished hypotheses are ranked by log-probability / length ** length_penalty."""
    stop: Literal["estimate", "exact", "first"] = "estimate"
    """When a beam ends: Hugging Face's early_stopping of False, "never" and True, in this order."""
    max_len: PositiveInt | None = None
    """Longest output in tokens, EOS counted; null: `data.max_target_len`."""
    min_len: NonNegativeInt = 0
    """Shortest output in tokens, EOS not counted; where a longest length is smaller, that holds."""
    max_ratio: float | None = Field(default=None, gt=0, le=1e6)
    """Longest output also by the source: its tokens x max_ratio + max_extra, rounded up; null: no such limit."""
    max_extra: NonNegativeInt = 0
    """Tokens added to the limit by `max_ratio`."""
    sample: bool = False
    """Draw outputs at random and do not search: `beam_size` and `stop` are then without meaning."""
    temperature: float = Field(default=1.0, ge=1e-3, le=1e3)
    """Of sampling: log-probabilities are divided by it; below 1 likely tokens become likelier."""
    top_k: NonNegativeInt = 0
    """Of sampling: draw from the k likeliest tokens only; 0: from all."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Of sampling: draw from the fewest likeliest tokens whose probabilities sum to p (nucleus sampling)."""
    seed: NonNegativeInt = 0
    """Of sampling: an output is a function of the seed, the line's number and the weights alone."""
    batch_tokens: PositiveInt = 4096
    """Source tokens (padding counted) that are decoded together."""

    @model_validator(mode="after")
    def _ratio_has_an_extra(self) -> Self:
        if self.max_extra and self.max_ratio is None:
            raise ValueError("max_extra belongs to max_ratio: set max_ratio too")
        return self
