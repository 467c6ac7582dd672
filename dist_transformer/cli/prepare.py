"""`dist-transformer prepare`: text to shards."""

import argparse
from typing import Any

from dist_transformer.cli.parsing import Commands, add_command, not_negative, positive
from dist_transformer.errors import ConfigError


def add_prepare(commands: Commands) -> None:
    """The command and its kinds of text."""
    prepare = add_command(
        commands,
        "prepare",
        "turn text into shards",
        "dist-transformer prepare text books/*.txt --documents paragraph --out shards/books",
        None,
    )
    kinds: Commands = prepare.add_subparsers(title="kinds of text", metavar="KIND", required=True)
    text = add_command(
        kinds,
        "text",
        "plain text, for pretraining",
        "dist-transformer prepare text books/*.txt --documents paragraph --vocab-size 16384 --out shards/books",
        _prepare_text,
    )
    text.add_argument("files", nargs="+", metavar="FILE", help="text in UTF-8, plain or .gz")
    text.add_argument(
        "--documents",
        choices=("line", "paragraph", "file"),
        default="line",
        help="what a document is: a line, lines up to an empty one, or a file (default: line)",
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
    pairs = add_command(
        kinds,
        "pairs",
        "source and target, line by line",
        "dist-transformer prepare pairs --source train.en --target train.de --out shards/en-de",
        _prepare_pairs,
    )
    pairs.add_argument("--source", required=True, metavar="FILE", help="source lines in UTF-8, plain or .gz")
    pairs.add_argument("--target", required=True, metavar="FILE", help="target lines, as many")
    pairs.add_argument("--eval-source", metavar="FILE", help="held-out source; default: a share of --source")
    pairs.add_argument("--eval-target", metavar="FILE", help="held-out target")
    for kind in (text, pairs):
        kind.add_argument(
            "--out",
            required=True,
            metavar="DIR",
            help="folder to write: shards, tokenizer.json, manifest.json",
        )
        kind.add_argument(
            "--tokenizer", metavar="FILE", help="use this tokenizer.json instead of training one"
        )
        kind.add_argument(
            "--vocab-size",
            type=positive,
            metavar="N",
            default=16384,
            help="tokens of a trained tokenizer (default: 16384)",
        )
        kind.add_argument(
            "--model",
            choices=("bpe", "unigram"),
            default="bpe",
            help="kind of tokenizer to train (default: bpe)",
        )
        kind.add_argument("--shards", type=positive, metavar="N", help="training shards (default: by size)")
        kind.add_argument("--workers", type=positive, metavar="N", help="processes (default: all cores)")
        kind.add_argument(
            "--held-out",
            type=not_negative,
            metavar="N",
            help="documents or pairs held out (default: 1 %%, at most 2000)",
        )
        kind.add_argument(
            "--bad-utf8",
            choices=("error", "replace"),
            default="error",
            help="what to do with bytes that are not UTF-8 (default: error)",
        )
        kind.add_argument(
            "--seed",
            type=not_negative,
            metavar="N",
            default=1,
            help="of the shuffle and the held-out choice (default: 1)",
        )
        kind.add_argument("--overwrite", action="store_true", help="replace a finished folder")


def _prepare_text(options: argparse.Namespace) -> None:
    from dist_transformer.data.prepare import prepare_text

    summary = prepare_text(
        options.files,
        options.out,
        documents=options.documents,
        max_document_tokens=options.max_document_tokens,
        eval_files=options.eval_files,
        **_prepare_options(options),
    )
    _print_prepared(summary)


def _prepare_pairs(options: argparse.Namespace) -> None:
    from dist_transformer.data.prepare import prepare_pairs

    if bool(options.eval_source) != bool(options.eval_target):
        raise ConfigError("--eval-source and --eval-target go together")
    summary = prepare_pairs(
        options.source,
        options.target,
        options.out,
        eval_source=options.eval_source,
        eval_target=options.eval_target,
        **_prepare_options(options),
    )
    _print_prepared(summary)


def _print_prepared(summary: Any) -> None:
    tokens = f"{summary.n_source_tokens:,} tokens"
    if summary.kind == "pairs":
        tokens = f"{summary.n_source_tokens:,} source and {summary.n_target_tokens:,} target tokens"
    print(
        f"{summary.out}: {summary.n_samples:,} samples in {summary.n_shards} shards, {tokens}, "
        f"{summary.n_eval_samples:,} held out, vocabulary of {summary.vocab_size:,}, {summary.seconds:.1f} s"
    )
    for count, what in ((summary.n_empty, "empty and left out"), (summary.n_split, "longer and split")):
        if count:
            print(f"{count:,} {what}")
    print(f"train on it: launch/local.sh CONFIG.yaml data.train={summary.out} data.eval={summary.out}")


def _prepare_options(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "tokenizer": options.tokenizer,
        "vocab_size": options.vocab_size,
        "model": options.model,
        "n_shards": options.shards,
        "workers": options.workers,
        "held_out": options.held_out,
        "bad_utf8": options.bad_utf8,
        "seed": options.seed,
        "overwrite": options.overwrite,
    }
