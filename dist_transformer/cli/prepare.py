"""`dist-transformer prepare`: text to shards, on one machine or by the tasks of a job array."""

import argparse
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dist_transformer.cli.parsing import Commands, Parser, add_command, not_negative, positive
from dist_transformer.errors import ConfigError, DataError

_LEFT_OUT = {
    "n_empty": "empty and left out",
    "n_bad_lines": "bad lines left out",
    "n_duplicates": "duplicates left out",
    "n_split": "longer and split",
}
_FORMATS = "UTF-8; plain, .gz or .zst"


def add_prepare(commands: Commands) -> None:
    """The command and its kinds of text."""
    prepare = add_command(
        commands,
        "prepare",
        "turn text into shards",
        "dist-transformer prepare text books/*.txt --documents paragraph --out shards/books",
        None,
    )
    kinds: Commands = prepare.add_subparsers(title="what to prepare", metavar="KIND", required=True)
    _add_text(kinds)
    _add_pairs(kinds)
    _add_tokenizer(kinds)
    merge = add_command(
        kinds,
        "merge",
        "join what the tasks of an array wrote; may be run again",
        "dist-transformer prepare merge shards/web",
        _merge,
    )
    merge.add_argument("out", metavar="DIR", help="their --out")


def _add_text(kinds: Commands) -> None:
    text = add_command(
        kinds,
        "text",
        "documents, for pretraining",
        "dist-transformer prepare text books/*.txt --documents paragraph --vocab-size 16384 --out shards/books\n"
        "  dist-transformer prepare text web/*.jsonl.zst --field text --bad-lines skip --dedup --out shards/web\n"
        "  dist-transformer prepare text --files-from list.txt --tokenizer tokenizer.json --task 3 --tasks 64 "
        "--out shards/web",
        _prepare_text,
    )
    _add_files(text, f"text or JSON lines (.jsonl, .ndjson, .json); {_FORMATS}")
    _add_documents(text)
    text.add_argument(
        "--field",
        metavar="KEY",
        default="text",
        help="of JSON lines: where the text is; a.b is b inside a (default: text)",
    )
    text.add_argument(
        "--max-document-tokens",
        type=positive,
        metavar="N",
        default=2048,
        help="longer documents are split (default: 2048)",
    )
    text.add_argument(
        "--eval-files", nargs="+", metavar="FILE", help="held-out text; default: a share of FILE"
    )
    _add_common(text)


def _add_pairs(kinds: Commands) -> None:
    pairs = add_command(
        kinds,
        "pairs",
        "sources and targets",
        "dist-transformer prepare pairs --source train.en --target train.de --out shards/en-de\n"
        "  dist-transformer prepare pairs pairs.jsonl.gz --source-field translation.en --target-field "
        "translation.de --out shards/en-de\n"
        "  dist-transformer prepare pairs words.tsv --out shards/words",
        _prepare_pairs,
    )
    _add_files(pairs, f"JSON lines (.jsonl, .ndjson, .json), or source, tab, target (.tsv); {_FORMATS}")
    pairs.add_argument("--source", nargs="+", metavar="FILE", default=[], help=f"source lines; {_FORMATS}")
    pairs.add_argument("--target", nargs="+", metavar="FILE", default=[], help="target lines, as many")
    for side in ("source", "target"):
        pairs.add_argument(
            f"--{side}-field",
            metavar="KEY",
            default=side,
            help=f"of JSON lines: where the {side} is; a.b is b inside a (default: {side})",
        )
    pairs.add_argument(
        "--eval-files", nargs="+", metavar="FILE", default=[], help="held-out pairs; default: a share of all"
    )
    pairs.add_argument("--eval-source", nargs="+", metavar="FILE", default=[], help="held-out source lines")
    pairs.add_argument("--eval-target", nargs="+", metavar="FILE", default=[], help="held-out target lines")
    _add_common(pairs)


def _add_tokenizer(kinds: Commands) -> None:
    tokenizer = add_command(
        kinds,
        "tokenizer",
        "train a tokenizer alone, on a random sample of the text of about 100 MB",
        "dist-transformer prepare tokenizer web/*.jsonl.zst --vocab-size 32000 --out tokenizer.json",
        _prepare_tokenizer,
    )
    _add_files(tokenizer, f"text or JSON lines (.jsonl, .ndjson, .json); {_FORMATS}")
    _add_documents(tokenizer)
    tokenizer.add_argument(
        "--field",
        nargs="+",
        metavar="KEY",
        default=["text"],
        help="of JSON lines: where the text is, in one place or several; a.b is b inside a (default: text)",
    )
    tokenizer.add_argument("--out", required=True, metavar="FILE", help="the tokenizer.json to write")
    tokenizer.add_argument("--overwrite", action="store_true", help="replace it")
    _add_model(tokenizer)
    _add_seed(tokenizer, "of the sample")


def _add_files(parser: Parser, help_: str) -> None:
    parser.add_argument("files", nargs="*", metavar="FILE", help=help_)
    parser.add_argument(
        "--files-from", metavar="LIST", help="more of them: a file with one name a line (-: standard input)"
    )


def _add_documents(parser: Parser) -> None:
    parser.add_argument(
        "--documents",
        choices=("line", "paragraph", "file"),
        default="line",
        help="what a document of plain text is: a line, lines up to an empty one, or a file (default: line)",
    )


def _add_policies(parser: Parser) -> None:
    parser.add_argument(
        "--bad-utf8",
        choices=("error", "replace"),
        default="error",
        help="what to do with bytes that are not UTF-8 (default: error)",
    )
    parser.add_argument(
        "--bad-lines",
        choices=("error", "skip"),
        default="error",
        help="what to do with damaged JSON, missing fields, wrong columns (default: error)",
    )


def _add_model(parser: Parser) -> None:
    parser.add_argument(
        "--vocab-size",
        type=positive,
        metavar="N",
        default=16384,
        help="tokens of a trained tokenizer (default: 16384)",
    )
    parser.add_argument(
        "--model",
        choices=("bpe", "unigram"),
        default="bpe",
        help="kind of tokenizer to train (default: bpe)",
    )


def _add_seed(parser: Parser, what: str) -> None:
    parser.add_argument("--seed", type=not_negative, metavar="N", default=1, help=f"{what} (default: 1)")


def _add_common(parser: Parser) -> None:
    parser.add_argument(
        "--out", required=True, metavar="DIR", help="folder to write: shards, tokenizer.json, manifest.json"
    )
    parser.add_argument("--tokenizer", metavar="FILE", help="use this tokenizer.json instead of training one")
    _add_model(parser)
    parser.add_argument("--shards", type=positive, metavar="N", help="training shards (default: by size)")
    parser.add_argument("--workers", type=positive, metavar="N", help="processes (default: all cores)")
    parser.add_argument(
        "--held-out",
        type=not_negative,
        metavar="N",
        help="documents or pairs held out (default: 1 %%, at most 2000)",
    )
    parser.add_argument(
        "--dedup",
        action="store_true",
        help="leave out documents or pairs that equal an earlier one; none that is held out is trained on",
    )
    parser.add_argument(
        "--raw", action="store_true", help="write text, tokenised while training, instead of tokens"
    )
    _add_policies(parser)
    _add_seed(parser, "of the shuffle and the held-out choice")
    parser.add_argument("--overwrite", action="store_true", help="replace a finished folder")
    array = parser.add_argument_group("work shared by several machines (then: prepare merge DIR)")
    array.add_argument("--task", type=not_negative, metavar="I", help="do the share of task I, from 0")
    array.add_argument("--tasks", type=positive, metavar="N", help="how many tasks there are")
    array.add_argument(
        "--array",
        action="store_true",
        help="take --task and --tasks, where not given, from SLURM_ARRAY_TASK_ID and SLURM_ARRAY_TASK_COUNT",
    )


def _files(options: argparse.Namespace, wanted: str = "FILE or --files-from LIST") -> list[str]:
    """The inputs named on the command line and in the list."""
    files: list[str] = list(options.files)
    if options.files_from is not None:
        try:
            listed = (
                sys.stdin.read() if options.files_from == "-" else Path(options.files_from).read_text("utf-8")
            )
        except OSError as error:
            raise DataError(f"--files-from {options.files_from} cannot be read: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise DataError(
                f"--files-from {options.files_from} is not a list of names: it is not UTF-8"
            ) from error
        files += [name for line in listed.splitlines() if (name := line.strip())]
    if not files:
        raise ConfigError(f"there is no input: give {wanted}")
    return files


def _task(options: argparse.Namespace) -> dict[str, int | None]:
    """Which share of how many to do; None: everything."""
    found = {}
    for name, value, variable in (
        ("task", options.task, "SLURM_ARRAY_TASK_ID"),
        ("tasks", options.tasks, "SLURM_ARRAY_TASK_COUNT"),
    ):
        if value is None and options.array:
            text = os.environ.get(variable, "")
            if not text.isdecimal():
                raise ConfigError(f"--array: {variable} is not set, so this is no job array: give --{name}")
            value = int(text)
        found[name] = value
    if (found["task"] is None) != (found["tasks"] is None):
        raise ConfigError("--task and --tasks go together")
    return {"task": found["task"], "n_tasks": found["tasks"]}


def _sides(sources: list[str], targets: list[str], names: str) -> Iterable[tuple[str, str]]:
    if len(sources) != len(targets):
        raise ConfigError(f"{names} go together: {len(sources)} and {len(targets)} files were given")
    return zip(sources, targets, strict=True)


def _prepare_text(options: argparse.Namespace) -> None:
    from dist_transformer.data.prepare import prepare_text

    summary = prepare_text(
        _files(options),
        options.out,
        documents=options.documents,
        field=options.field,
        max_document_tokens=options.max_document_tokens,
        eval_files=options.eval_files,
        **_prepare_options(options),
    )
    _print_prepared(summary, options)


def _prepare_pairs(options: argparse.Namespace) -> None:
    from dist_transformer.data.prepare import prepare_pairs

    files: list[Any] = list(_sides(options.source, options.target, "--source and --target"))
    if not files or options.files or options.files_from is not None:
        files += _files(options, "FILE, --files-from LIST, or --source and --target")
    held = _sides(options.eval_source, options.eval_target, "--eval-source and --eval-target")
    summary = prepare_pairs(
        files,
        options.out,
        source_field=options.source_field,
        target_field=options.target_field,
        eval_files=[*options.eval_files, *held],
        **_prepare_options(options),
    )
    _print_prepared(summary, options)


def _prepare_options(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "tokenizer": options.tokenizer,
        "vocab_size": options.vocab_size,
        "model": options.model,
        "n_shards": options.shards,
        "workers": options.workers,
        "held_out": options.held_out,
        "dedup": options.dedup,
        "raw": options.raw,
        "bad_utf8": options.bad_utf8,
        "bad_lines": options.bad_lines,
        "seed": options.seed,
        "overwrite": options.overwrite,
        **_task(options),
    }


def _prepare_tokenizer(options: argparse.Namespace) -> None:
    from dist_transformer.data.train_tokenizer import train_tokenizer

    summary = train_tokenizer(
        _files(options),
        options.out,
        documents=options.documents,
        fields=options.field,
        vocab_size=options.vocab_size,
        model=options.model,
        seed=options.seed,
        overwrite=options.overwrite,
    )
    print(
        f"{summary.out}: vocabulary of {summary.vocab_size:,}, trained on {summary.n_bytes / 1e6:,.1f} MB of text, "
        f"{summary.seconds:.1f} s"
    )
    if summary.n_bad_lines:
        print(f"{summary.n_bad_lines:,} bad lines left out")


def _merge(options: argparse.Namespace) -> None:
    from dist_transformer.data.array import merge

    _print_prepared(merge(options.out), None)


def _print_prepared(summary: Any, task: argparse.Namespace | None) -> None:
    tokens = f"{summary.n_source_tokens:,} tokens"
    if summary.kind == "pairs":
        tokens = f"{summary.n_source_tokens:,} source and {summary.n_target_tokens:,} target tokens"
    print(
        f"{summary.out}: {summary.n_samples:,} samples in {summary.n_shards} shards, {tokens}, "
        f"{summary.n_eval_samples:,} held out, vocabulary of {summary.vocab_size:,}, {summary.seconds:.1f} s"
    )
    for name, what in _LEFT_OUT.items():
        if n_left_out := summary.counts.get(name):
            print(f"{n_left_out:,} {what}")
    if task is not None and (task.array or task.tasks is not None):
        print(f"when all tasks are done: dist-transformer prepare merge {task.out}")
    else:
        print(f"train on it: launch/local.sh CONFIG.yaml data.train={summary.out} data.eval={summary.out}")
