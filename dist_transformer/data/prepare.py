"""Preparation: text files become a folder of shards, a tokenizer and a manifest.

Four stages: read the inputs (check them, cut them into segments), train or copy the tokenizer, tokenise,
write shards. Each leaves what it finished in the folder, so an interrupted preparation goes on when the same
command runs again, and gives the same bytes as one that was never interrupted. The manifest is written last:
a folder with one is complete.
"""

from collections.abc import Sequence
from pathlib import Path

from dist_transformer.data.documents import BadUtf8, DocumentUnit, Input
from dist_transformer.data.folder import Recipe
from dist_transformer.data.preparation import Preparation, PreparedSummary
from dist_transformer.data.tokenizer import Model
from dist_transformer.errors import DataError

__all__ = ["PreparedSummary", "prepare_pairs", "prepare_text"]

PathLike = str | Path


def prepare_text(
    files: Sequence[PathLike],
    out: PathLike,
    *,
    documents: DocumentUnit = "line",
    tokenizer: PathLike | None = None,
    vocab_size: int = 16384,
    n_shards: int | None = None,
    workers: int | None = None,
    held_out: int | None = None,
    eval_files: Sequence[PathLike] | None = None,
    max_document_tokens: int = 2048,
    model: Model = "bpe",
    seed: int = 1,
    bad_utf8: BadUtf8 = "error",
    overwrite: bool = False,
) -> PreparedSummary:
    """Prepare plain text for span corruption.

    Args:
        files: UTF-8 text, plain or `.gz`.
        out: The folder to write; new, empty, or half-written by the same command.
        documents: What one document is: a line, a paragraph (blank lines between), or a whole file.
        tokenizer: A `tokenizer.json` to use; None: train one on the training documents (on about 100 MB of
            them, chosen at random, where there is more).
        vocab_size: Ids of a trained tokenizer, special tokens and 100 sentinels counted.
        n_shards: Training shards; None: about 64 MB each, and 24 to 96 at least where there are enough documents.
        workers: Processes; None: one per core.
        held_out: Documents kept for evaluation, chosen by a hash of (seed, number of the document); None: 1
            %, at most 2000; 0: none.
        eval_files: Held-out text from files of its own instead.
        max_document_tokens: Longer documents are written as several samples.
        model: Of a trained tokenizer; see `TextTokenizer.train`.
        seed: Decides the shuffling and what is held out.
        bad_utf8: error: refuse bytes that are not UTF-8, naming file, line and byte; replace: U+FFFD in their
            place.
        overwrite: Replace a folder that an earlier preparation wrote.

    Raises:
        DataError: bad input, an output folder that is complete or somebody else's, or other arguments than
            the half-written folder was begun with.
    """
    recipe = Recipe(
        kind="text", unit=documents, vocab_size=vocab_size, model=model, n_shards=n_shards, held_out=held_out,
        max_document_tokens=max_document_tokens, seed=seed, bad_utf8=bad_utf8,
    )  # fmt: skip
    inputs = [Input((str(name),), documents, bad_utf8) for name in files]
    held = [Input((str(name),), documents, bad_utf8) for name in eval_files or ()]
    return Preparation(recipe, Path(out), inputs, held, tokenizer, workers, overwrite).run()


def prepare_pairs(
    source: PathLike,
    target: PathLike,
    out: PathLike,
    *,
    eval_source: PathLike | None = None,
    eval_target: PathLike | None = None,
    tokenizer: PathLike | None = None,
    vocab_size: int = 16384,
    n_shards: int | None = None,
    workers: int | None = None,
    held_out: int | None = None,
    model: Model = "bpe",
    seed: int = 1,
    bad_utf8: BadUtf8 = "error",
    overwrite: bool = False,
) -> PreparedSummary:
    """Prepare pairs for supervised training: line i of `source` belongs to line i of `target`.

    One tokenizer serves both sides and is trained on both. Pairs with an empty side are left out and counted.
    `eval_source` and `eval_target` are held-out pairs of their own; other arguments as in `prepare_text`.

    Raises:
        DataError: as `prepare_text`, and files with different numbers of lines.
    """
    if (eval_source is None) != (eval_target is None):
        raise DataError("eval_source and eval_target belong together: give both or neither")
    recipe = Recipe(
        kind="pairs", unit="line", vocab_size=vocab_size, model=model, n_shards=n_shards, held_out=held_out,
        max_document_tokens=0, seed=seed, bad_utf8=bad_utf8,
    )  # fmt: skip
    inputs = [Input((str(source), str(target)), "line", bad_utf8)]
    held = [Input((str(eval_source), str(eval_target)), "line", bad_utf8)] if eval_source is not None else []
    return Preparation(recipe, Path(out), inputs, held, tokenizer, workers, overwrite).run()
