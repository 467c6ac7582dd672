"""Objectives: what a model learns to do with the samples of a shard."""

from dist_transformer.config.data import CorpusConfig, DataConfig
from dist_transformer.data.objectives.base import Fields, Objective, Samples
from dist_transformer.data.objectives.pairs import Pairs
from dist_transformer.data.objectives.span_corruption import SpanCorruption
from dist_transformer.data.tokenizer import TextTokenizer
from dist_transformer.errors import DataError

__all__ = ["Fields", "Objective", "Pairs", "Samples", "SpanCorruption", "build_objective"]


def build_objective(data: DataConfig, corpus: CorpusConfig, tokenizer: TextTokenizer) -> Objective:
    """The objective of a corpus, one of `data.corpora()`.

    Raises:
        DataError: the rows are too short for it, or the tokenizer lacks tokens that it needs.
    """
    if corpus.objective == "pairs":
        assert corpus.too_long is not None
        return Pairs(data.max_source_len, data.max_target_len, corpus.too_long, tokenizer.eos_id)
    if corpus.objective == "span_corruption":
        assert corpus.noise_density is not None and corpus.mean_noise_span is not None
        objective = SpanCorruption(
            density=corpus.noise_density,
            mean_span=corpus.mean_noise_span,
            max_source_len=data.max_source_len,
            max_target_len=data.max_target_len,
            eos_id=tokenizer.eos_id,
            sentinel_ids=tokenizer.sentinel_ids,
        )
        objective.longest_piece()  # raises where the rows are too short
        return objective
    raise DataError(f"data.objective={corpus.objective} is not built yet")
