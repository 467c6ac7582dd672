"""What a preparation wrote, for the person who ran it."""

from dataclasses import dataclass
from pathlib import Path

from dist_transformer.data.manifest import Kind, Manifest


@dataclass(frozen=True)
class PreparedSummary:
    """What a preparation wrote."""

    out: Path
    kind: Kind
    n_samples: int
    """Training samples."""
    n_eval_samples: int
    n_shards: int
    """Training shards."""
    n_source_tokens: int
    """Training tokens of sources or documents, without EOS."""
    n_target_tokens: int
    counts: dict[str, int]
    """What was left out and split, as in the manifest."""
    vocab_size: int
    """What the tokenizer has; little text can give fewer ids than were asked for."""
    seconds: float

    @classmethod
    def of(cls, manifest: Manifest, seconds: float) -> "PreparedSummary":
        """The summary of a finished folder."""
        return cls(
            out=manifest.root,
            kind=manifest.kind,
            n_samples=sum(shard.n_samples for shard in manifest.train),
            n_eval_samples=sum(shard.n_samples for shard in manifest.eval),
            n_shards=len(manifest.train),
            n_source_tokens=sum(shard.n_source_tokens for shard in manifest.train),
            n_target_tokens=sum(shard.n_target_tokens for shard in manifest.train),
            counts=manifest.counts,
            vocab_size=manifest.vocab_size,
            seconds=seconds,
        )
