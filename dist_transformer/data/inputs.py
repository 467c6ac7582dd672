"""What is prepared: which files, and how documents or pairs are read from them."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from dist_transformer.data.compressed import inner_suffix, is_compressed
from dist_transformer.errors import DataError

DocumentUnit = Literal["line", "paragraph", "file"]
BadUtf8 = Literal["error", "replace"]
BadLines = Literal["error", "skip"]


@dataclass(frozen=True)
class Reading:
    """How documents are read from files."""

    unit: DocumentUnit
    """Of plain text; each line of JSON lines or columns is a document or pair."""
    bad_utf8: BadUtf8
    bad_lines: BadLines
    fields: tuple[str, ...]
    """Of JSON lines: the text's, or the source's and the target's."""


@dataclass(frozen=True)
class Input:
    """One file, or a source and a target file whose lines belong together."""

    files: tuple[str, ...]
    reading: Reading

    @property
    def is_compressed(self) -> bool:
        """Whether reading from the middle means unpacking all that comes before."""
        return any(map(is_compressed, self.files))

    @cached_property
    def is_json(self) -> bool:
        """Whether its lines are JSON objects; the name says so."""
        return len(self.files) == 1 and is_json_lines(self.files[0])

    @cached_property
    def has_records(self) -> bool:
        """Whether each line is a JSON object or a row of columns."""
        return self.is_json or len(self.files) < self.n_sides

    @property
    def n_sides(self) -> int:
        """1 for documents, 2 for pairs."""
        return len(self.reading.fields)


def is_json_lines(name: str) -> bool:
    """Whether a file's name says that its lines are JSON objects."""
    return inner_suffix(name) in (".jsonl", ".ndjson", ".json")


def holds_pairs(name: str) -> bool:
    """Whether a file can hold both sides of pairs: JSON lines, or two columns."""
    return is_json_lines(name) or inner_suffix(name) == ".tsv"


def check_inputs(inputs: Sequence[Input], held: Sequence[Input]) -> None:
    """Refuse missing files and files given twice, before anything is read."""
    seen: set[Path] = set()
    if not inputs:
        raise DataError("no input files were given")
    for source in (*inputs, *held):
        for name in source.files:
            path = Path(name)
            if not path.is_file():
                raise DataError(
                    f"{name} {'is a folder' if path.is_dir() else 'does not exist'}: give a text file"
                )
            if (resolved := path.resolve()) in seen:
                raise DataError(f"{name} was given twice: its text would count double; name it once")
            seen.add(resolved)
