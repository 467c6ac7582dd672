"""Decoding over a model: search, whole texts, gaps of a span-corruption model. Knows no engine, no rank."""

from dist_transformer.generate.search import Hypothesis, beam_search
from dist_transformer.generate.spans import Filled, fill_texts
from dist_transformer.generate.text import Generated, describe_truncated, generate_texts

__all__ = [
    "Filled",
    "Generated",
    "Hypothesis",
    "beam_search",
    "describe_truncated",
    "fill_texts",
    "generate_texts",
]
