"""The batch: rows of packed samples, what is counted about them, and the cursors that travel with them."""

from dataclasses import dataclass, field, fields, replace
from typing import Any, Self

import torch
from torch import Tensor

from dist_transformer.data.cursor import Cursor


@dataclass
class Batch:
    """Rows of tokens for one forward pass. Shape legend: B rows, S source positions, T target positions.

    A segment id is 0 on padding and counts the samples of its row from 1; a source and a target of the same
    sample have the same id. Positions restart at 0 in every sample.
    """

    encoder_input_tokens: Tensor
    """[B, S] int64."""
    encoder_segment_ids: Tensor
    """[B, S] int32."""
    encoder_positions: Tensor
    """[B, S] int32."""
    decoder_input_tokens: Tensor
    """[B, T] int64: the target shifted right by one within each sample, PAD_ID first."""
    decoder_target_tokens: Tensor
    """[B, T] int64: what is predicted; PAD_ID does not count."""
    decoder_segment_ids: Tensor
    """[B, T] int32."""
    decoder_positions: Tensor
    """[B, T] int32."""
    n_source_tokens: int = 0
    """Source tokens without padding."""
    n_target_tokens: int = 0
    """Target tokens without padding."""
    n_pairs: int = 0
    """Samples in all rows."""
    lanes: list[int] = field(default_factory=list)
    """The lane each row of the run came from; B of them, but for buckets, of which each fills several rows."""
    cursors: list[Cursor] = field(default_factory=list)
    """The cursor of its lane after each row of the run."""
    rows: list[int] = field(default_factory=list)
    """Each row's place in the run's global order of rows, from 0."""
    n_truncated: int = 0
    """Pairs that were cut to fit their row."""
    n_split: int = 0
    """Documents, counted at their first piece, that were cut into several samples."""
    n_dropped: int = 0
    """Samples left out: too long (policy `drop`) or empty."""
    n_bad: int = 0
    """Samples lost to damaged or unreachable shards (policy `skip`)."""
    problems: list[str] = field(default_factory=list)
    """Sentences about such samples, not always of this very batch."""
    fingerprint: int = 0
    """Sum of the rows' hashes, each of a row's number and tokens; 0 where it was not asked for."""

    def to(self, device: torch.device) -> Self:
        """The same batch with its tensors on `device`."""
        tensors = {f.name: value for f in fields(self) if isinstance(value := getattr(self, f.name), Tensor)}
        if device.type == "cuda":  # From other memory a copy would wait for all work before it.
            tensors = {name: value.pin_memory() for name, value in tensors.items()}
        moved: dict[str, Any] = {name: value.to(device, non_blocking=True) for name, value in tensors.items()}
        return replace(self, **moved)

    @property
    def n_positions(self) -> int:
        """Positions of both sides, padding counted."""
        return self.encoder_input_tokens.numel() + self.decoder_input_tokens.numel()
