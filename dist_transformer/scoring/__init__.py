"""Scores of texts against references: which metrics there are, and how several references count. Knows no model."""

from dist_transformer.scoring.metrics import Score, lower_is_better, score_texts
from dist_transformer.scoring.references import Grouped, group_by_source

__all__ = ["Grouped", "Score", "group_by_source", "lower_is_better", "score_texts"]
