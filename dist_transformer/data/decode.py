"""The bytes of samples become tokens, whole windows at a time, and everything wrong with them is found."""

import json
from collections.abc import Sequence
from functools import cache
from itertools import chain
from pathlib import Path

import numpy as np

from dist_transformer.data.hashing import Int64
from dist_transformer.data.layout import SampleLayout
from dist_transformer.data.ragged import Tokens
from dist_transformer.data.tokenizer import TextTokenizer

Fields = tuple[tuple[Tokens, Int64], ...]
"""For each field of a sample, flat tokens and the lengths of the samples."""
Problems = list[tuple[int, str]]
"""Numbers of samples and what is wrong with each."""


def decode(samples: Sequence[tuple[bytes, ...]], layout: SampleLayout) -> tuple[Fields, Problems]:
    """The tokens of samples, or what is wrong with them.

    Args:
        samples: For each, the content of its members.
        layout: What they are.

    Returns:
        The fields, and an empty list; where anything is wrong, the fields mean nothing.
    """
    if layout.is_raw:
        return _decode_text(samples, layout)
    columns = zip(*samples, strict=True) if samples else [()] * len(layout.members)
    fields, problems = [], []
    for column in columns:
        field, found = _decode_tokens(column, layout)
        fields.append(field)
        problems += found
    return tuple(fields), sorted(problems)


def _decode_tokens(column: tuple[bytes, ...], layout: SampleLayout) -> tuple[tuple[Tokens, Int64], Problems]:
    n_bytes = layout.dtype.itemsize
    sizes = np.fromiter(map(len, column), np.int64, len(column))
    lengths = sizes // n_bytes
    if (odd := np.flatnonzero(sizes % n_bytes)).size:
        what = f"bytes are no whole number of {n_bytes}-byte tokens"
        return (np.zeros(0, layout.dtype), lengths), [(int(i), f"{sizes[i]} {what}") for i in odd]
    flat: Tokens = np.frombuffer(b"".join(column), layout.dtype)
    problems = []
    if flat.size and int(flat.max()) >= layout.vocab_size:
        places = np.flatnonzero(flat >= layout.vocab_size)
        rows, first = np.unique(np.searchsorted(np.cumsum(lengths), places, side="right"), return_index=True)
        problems = [
            (
                int(row),
                f"token {flat[places[i]]} is outside the vocabulary of {layout.vocab_size}: the tokenizer does "
                "not match the shards",
            )
            for row, i in zip(rows, first, strict=True)
        ]
    return (flat, lengths), problems


def _decode_text(samples: Sequence[tuple[bytes, ...]], layout: SampleLayout) -> tuple[Fields, Problems]:
    texts: list[str] = []
    problems = []
    for number, sample in enumerate(samples):
        for member, key in layout.fields:
            try:
                texts.append(_text(sample[member], key))
            except ValueError as error:
                problems.append((number, f"{layout.members[member]} {error}"))
                break
    if problems:
        return (), problems
    assert layout.tokenizer_path is not None, "raw shards are read with the tokenizer of their folder"
    ids = _tokenizer(layout.tokenizer_path).encode_batch(texts)
    n_fields = len(layout.fields)
    fields = []
    for i in range(n_fields):
        column = ids[i::n_fields]
        lengths = np.fromiter(map(len, column), np.int64, len(column))
        fields.append((np.fromiter(chain.from_iterable(column), layout.dtype, int(lengths.sum())), lengths))
    return tuple(fields), []


def _text(content: bytes, key: str | None) -> str:
    """The text of a field.

    Raises:
        ValueError: there is none; the message goes on after the member's name.
    """
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"is not UTF-8 (byte {error.start})") from None
    if key is None:
        return text
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError("is not JSON") from None
    for name in key.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    if not isinstance(value, str):
        raise ValueError(f"is no JSON object with a text {key!r}")
    return value


@cache
def _tokenizer(path: Path) -> TextTokenizer:
    return TextTokenizer.load(path)
