"""How full packed rows are."""

import argparse
from itertools import islice

import numpy as np

from benchmarks.data_parts.corpora import ROWS, corpora, stream
from benchmarks.data_parts.results import Results, at_least

FILL_ROWS = 2000
"""Rows over which their filling is measured."""


def fill(options: argparse.Namespace, results: Results) -> None:
    """Share of both sides of packed rows that holds tokens."""
    for name, data in corpora(options):
        tokens, n_rows = np.zeros(2), 0
        with stream(data) as batches:
            for batch in islice(batches, FILL_ROWS // ROWS):
                tokens += batch.n_source_tokens, batch.n_target_tokens
                n_rows += len(batch.rows)
        lengths = data.max_source_len, data.max_target_len
        for side, n_tokens, length in zip(("source", "target"), tokens, lengths, strict=True):
            what = f"{name}, rows of {lengths[0]} / {lengths[1]}: {side} side filled"
            # A window of UL2 holds few documents of its longest spans: nothing is promised.
            target = at_least(97) if data.objective != "ul2" else None
            results.add(what, 100 * n_tokens / (n_rows * length), "%", target)
