"""Preparation: text files become a folder of shards, a tokenizer and a manifest.

The stages: read the inputs (check them, cut them into segments), find duplicates if asked, train or copy the
tokenizer, tokenise, write shards. Each leaves what it finished in the folder, so an interrupted preparation
goes on when the same command runs again, and gives the same bytes as one that was never interrupted. The
manifest is written last: a folder with one is complete.

Several machines share the work when each runs one task of several; `merge` then joins what they wrote.
"""

from collections.abc import Sequence
from pathlib import Path

from dist_transformer.data.array import begin_task, finished_task
from dist_transformer.data.folder import Recipe
from dist_transformer.data.inputs import (
    BadLines,
    BadUtf8,
    DocumentUnit,
    Input,
    Reading,
    holds_pairs,
    is_json_lines,
)
from dist_transformer.data.preparation import Preparation
from dist_transformer.data.shares import Share
from dist_transformer.data.summary import PreparedSummary
from dist_transformer.data.tokenizer import Model
from dist_transformer.errors import DataError

__all__ = ["PreparedSummary", "prepare_pairs", "prepare_text"]

PathLike = str | Path
PairFiles = PathLike | tuple[PathLike, PathLike]
"""A file with both sides, or a source and a target file."""


def prepare_text(
    files: Sequence[PathLike],
    out: PathLike,
    *,
    documents: DocumentUnit = "line",
    field: str = "text",
    tokenizer: PathLike | None = None,
    vocab_size: int = 16384,
    n_shards: int | None = None,
    workers: int | None = None,
    held_out: int | None = None,
    eval_files: Sequence[PathLike] | None = None,
    max_document_tokens: int = 2048,
    dedup: bool = False,
    raw: bool = False,
    model: Model = "bpe",
    seed: int = 1,
    bad_utf8: BadUtf8 = "error",
    bad_lines: BadLines = "error",
    overwrite: bool = False,
    task: int | None = None,
    n_tasks: int | None = None,
) -> PreparedSummary:
    """Prepare text for span corruption, prefix language modelling and the like.

    Args:
        files: UTF-8 text, or JSON lines (`.jsonl`, `.ndjson`, `.json`); plain, `.gz` or `.zst`.
        out: The folder to write; new, empty, or half-written by the same command.
        documents: What one document of plain text is: a line, a paragraph (blank lines between), or a whole
            file. A JSON line is a document.
        field: Of JSON lines: where the text is; `a.b` is b inside a.
        tokenizer: A `tokenizer.json` to use; None: train one on the training documents (on about 100 MB of
            them, chosen at random, where there is more).
        vocab_size: Ids of a trained tokenizer, special tokens and 100 sentinels counted.
        n_shards: Training shards; None: about 64 MB each, and 24 to 96 at least where there are enough documents.
        workers: Processes; None: one per core.
        held_out: Documents kept for evaluation, chosen by a hash of (seed, number of the document); None: 1
            %, at most 2000; 0: none.
        eval_files: Held-out text from files of its own instead.
        max_document_tokens: Longer documents are written as several samples.
        dedup: Leave out documents that are equal to an earlier one. No document of the training split then
            equals one that is held out.
        raw: Write text, which loader workers tokenise, instead of tokens: for trying tokenizers, at a price in
            loading speed. Documents are not split then, whatever `max_document_tokens` says.
        model: Of a trained tokenizer; see `TextTokenizer.train`.
        seed: Decides the shuffling and what is held out.
        bad_utf8: error: refuse bytes that are not UTF-8, naming file, line and byte; replace: U+FFFD in their
            place.
        bad_lines: error: refuse a JSON line that is damaged or has no such string, naming file and line;
            skip: leave it out and count it.
        overwrite: Replace a folder that an earlier preparation wrote.
        task: Do the share of this task, from 0, of several; `merge` joins them.
        n_tasks: How many tasks there are.

    Raises:
        DataError: bad input, an output folder that is complete or somebody else's, or other arguments than
            the half-written folder was begun with.
    """
    reading = Reading(documents, bad_utf8, bad_lines, (field,))
    recipe = Recipe(
        kind="text", reading=reading, vocab_size=vocab_size, model=model, n_shards=n_shards, held_out=held_out,
        max_document_tokens=max_document_tokens, seed=seed, dedup=dedup, raw=raw,
    )  # fmt: skip
    inputs = [Input((str(name),), reading) for name in files]
    held = [Input((str(name),), reading) for name in eval_files or ()]
    return _prepare(recipe, Path(out), inputs, held, tokenizer, workers, overwrite, task, n_tasks)


def prepare_pairs(
    files: Sequence[PairFiles],
    out: PathLike,
    *,
    source_field: str = "source",
    target_field: str = "target",
    eval_files: Sequence[PairFiles] | None = None,
    tokenizer: PathLike | None = None,
    vocab_size: int = 16384,
    n_shards: int | None = None,
    workers: int | None = None,
    held_out: int | None = None,
    dedup: bool = False,
    raw: bool = False,
    model: Model = "bpe",
    seed: int = 1,
    bad_utf8: BadUtf8 = "error",
    bad_lines: BadLines = "error",
    overwrite: bool = False,
    task: int | None = None,
    n_tasks: int | None = None,
) -> PreparedSummary:
    """Prepare pairs for supervised training.

    One tokenizer serves both sides and is trained on both. Pairs with an empty side are left out and counted.

    Args:
        files: JSON lines (`.jsonl`, `.ndjson`, `.json`) or two columns with a tab between (`.tsv`); or tuples
            of a source and a target file, of which line i of one belongs to line i of the other.
        out: The folder to write.
        source_field: Of JSON lines: where the source is; `a.b` is b inside a.
        target_field: Where the target is.
        eval_files: Held-out pairs from files of their own, in any of these forms.
        dedup: Leave out pairs of which both sides are equal to an earlier pair's.
        tokenizer, vocab_size, n_shards, workers, held_out, raw, model, seed, bad_utf8, overwrite, task,
            n_tasks: As
            in `prepare_text`.
        bad_lines: Also of lines that have not two columns.

    Raises:
        DataError: as `prepare_text`, and files with different numbers of lines.
    """
    reading = Reading("line", bad_utf8, bad_lines, (source_field, target_field))
    recipe = Recipe(
        kind="pairs", reading=reading, vocab_size=vocab_size, model=model, n_shards=n_shards, held_out=held_out,
        max_document_tokens=0, seed=seed, dedup=dedup, raw=raw,
    )  # fmt: skip
    inputs = [_pair_input(given, reading) for given in files]
    held = [_pair_input(given, reading) for given in eval_files or ()]
    return _prepare(recipe, Path(out), inputs, held, tokenizer, workers, overwrite, task, n_tasks)


def _pair_input(given: PairFiles, reading: Reading) -> Input:
    if isinstance(given, tuple):
        for name in given:
            if is_json_lines(str(name)):
                raise DataError(
                    f"{name} is JSON lines, which hold both sides: give it as one file, not as a side"
                )
        return Input((str(given[0]), str(given[1])), reading)
    if not holds_pairs(str(given)):
        raise DataError(
            f"{given}: a file of pairs is .jsonl or .tsv (also .gz or .zst); give plain text as a source and a "
            "target file, with --source and --target"
        )
    return Input((str(given),), reading)


def _prepare(
    recipe: Recipe,
    out: Path,
    inputs: list[Input],
    held: list[Input],
    tokenizer: PathLike | None,
    workers: int | None,
    overwrite: bool,
    task: int | None,
    n_tasks: int | None,
) -> PreparedSummary:
    share = Share()
    if (task is None) != (n_tasks is None):
        raise DataError("a task and the number of tasks belong together: give both or neither")
    if task is not None and n_tasks is not None:
        if tokenizer is None:
            raise DataError(
                "tasks of an array need one --tokenizer FILE for all of them: make it with `dist-transformer "
                "prepare tokenizer FILES --vocab-size N --out tokenizer.json`"
            )
        share, inputs, out = begin_task(recipe, out, inputs, held, tokenizer, task, n_tasks)
        if not overwrite and (done := finished_task(recipe, out, share, tokenizer)) is not None:
            return done
    return Preparation(recipe, out, inputs, held, tokenizer, workers, overwrite, share).run()
