"""Objectives over made-up text, and their pieces as lists."""

from typing import Any

import numpy as np

from dist_transformer.config.data import DataConfig
from dist_transformer.data.objectives import Denoising, Objective, Pieces, Window, build_objective
from dist_transformer.data.tokenizer import TextTokenizer

FIRST_TEXT = 10
"""Made-up text has ids from here on, below those of sentinels."""


def text_objective(tokenizer: TextTokenizer, **changes: Any) -> Denoising:
    """An objective as a run builds it."""
    data = DataConfig(**({"train": "shards"} | changes))
    objective = build_objective(data, data.corpora()[0], tokenizer)
    assert isinstance(objective, Denoising)
    return objective


def documents(lengths: list[int], key: int = 5, first: int = 0) -> Window:
    """Made-up documents of these lengths."""
    sizes = np.array(lengths, np.int64)
    tokens = np.random.default_rng(0).integers(FIRST_TEXT, 200, int(sizes.sum())).astype(np.uint16)
    return Window(((tokens, sizes),), first + np.arange(len(sizes)), key, "shard s")


def texts(window: Window) -> list[list[int]]:
    """The documents of a window."""
    tokens, lengths = window.fields[0]
    return [part.tolist() for part in np.split(tokens, np.cumsum(lengths))[: len(lengths)]]


def pairs_of(objective: Objective, window: Window, pieces: Pieces) -> list[tuple[list[int], list[int]]]:
    """(source, target) of each piece."""
    samples = objective.write(window, pieces)
    assert samples.source_lengths.sum() == len(samples.source_tokens)
    assert samples.target_lengths.sum() == len(samples.target_tokens)
    sources = np.split(samples.source_tokens, np.cumsum(samples.source_lengths)[:-1])
    targets = np.split(samples.target_tokens, np.cumsum(samples.target_lengths)[:-1])
    return [(s.tolist(), t.tolist()) for s, t in zip(sources, targets, strict=True) if len(s)]


def cut_pairs(objective: Objective, window: Window) -> list[tuple[list[int], list[int]]]:
    """(source, target) of each document by itself."""
    return pairs_of(objective, window, objective.cut(window))


def restore(objective: Denoising, source: list[int], target: list[int]) -> list[int]:
    """The text that a corrupted source and its target came from."""
    assert source[-1] == target[-1] == objective.eos_id
    source, target = source[:-1], target[:-1]
    if source and source[0] in {denoiser.mode_id for denoiser in objective.denoisers}:
        source = source[1:]
    sentinels = [token for token in source if token in objective.sentinel_ids]
    if not sentinels:
        return source + target
    spans: dict[int, list[int]] = {}
    for token in target:
        if token in objective.sentinel_ids:
            spans[token] = []
        else:
            spans[list(spans)[-1]].append(token)
    assert all(spans.values()), "a sentinel without tokens"
    assert sentinels == list(spans) == list(objective.sentinel_ids[: len(spans)])
    return [token for place in source for token in spans.get(place, [place])]


def restore_all(
    objective: Denoising, window: Window, pieces: Pieces
) -> tuple[list[list[int]], list[tuple[int, int]]]:
    """The documents that pieces in any order make up, and (document, begin) of the pieces."""
    parts = pairs_of(objective, window, pieces)
    places = list(zip(pieces.sample.tolist(), pieces.begin.tolist(), strict=True))
    found: list[list[int]] = [[] for _ in range(len(window))]
    for (sample, begin), pair in sorted(zip(places, parts, strict=True)):
        assert begin == len(found[sample])
        found[sample] += restore(objective, *pair)
    return found, places
