"""The command line: arguments to calls, nothing else. Everything heavy is imported by the command that needs it."""

import argparse
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

from dist_transformer import __version__
from dist_transformer.errors import ConfigError, UserError


class _Parser(argparse.ArgumentParser):
    """Wrong arguments are one sentence and exit code 2, as wrong configuration is."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


_Commands: TypeAlias = "argparse._SubParsersAction[_Parser]"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns 0 if it worked, 1 if it failed, 2 for bad arguments or configuration."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    rank = int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")))
    try:
        options.run(options)
    except UserError as error:
        if options.debug:
            traceback.print_exc()
        elif rank == 0 or not error.on_every_rank:
            where = f"rank {rank}: " if rank else ""
            print(f"dist-transformer: {where}{error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("dist-transformer: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, PTH123 - the reader is gone: nothing more to say
        return 1
    return 0


def build_parser() -> _Parser:
    """All commands and their options."""
    parser = _Parser(
        prog="dist-transformer",
        description="Pretrain encoder-decoder Transformers on a cluster.",
    )
    parser.add_argument("--version", action="version", version=f"dist-transformer {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands: _Commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_prepare(commands)
    _add_train(commands)
    _add_generate(commands)
    _add_evaluate(commands)
    _add_report(commands)
    _add_config(commands)
    return parser


def _command(
    commands: _Commands, name: str, help_: str, example: str, run: Callable[[argparse.Namespace], None] | None
) -> _Parser:
    parser = commands.add_parser(
        name,
        help=help_,
        description=help_[0].upper() + help_[1:] + ".",
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    if run is not None:
        parser.set_defaults(run=run)
    # After the command too; SUPPRESS keeps the value given before it.
    parser.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    return parser


def _add_prepare(commands: _Commands) -> None:
    prepare = _command(
        commands,
        "prepare",
        "turn text into shards",
        "dist-transformer prepare text books/*.txt --documents paragraph --out shards/books",
        None,
    )
    kinds: _Commands = prepare.add_subparsers(title="kinds of text", metavar="KIND", required=True)
    text = _command(
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
        type=_positive,
        metavar="N",
        default=2048,
        help="longer documents are split (default: 2048)",
    )
    text.add_argument(
        "--eval-files", nargs="+", metavar="FILE", help="held-out text; default: a share of FILE"
    )
    pairs = _command(
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
            type=_positive,
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
        kind.add_argument("--shards", type=_positive, metavar="N", help="training shards (default: by size)")
        kind.add_argument("--workers", type=_positive, metavar="N", help="processes (default: all cores)")
        kind.add_argument(
            "--held-out",
            type=_count,
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
            type=_count,
            metavar="N",
            default=1,
            help="of the shuffle and the held-out choice (default: 1)",
        )
        kind.add_argument("--overwrite", action="store_true", help="replace a finished folder")


def _add_train(commands: _Commands) -> None:
    train = _command(
        commands,
        "train",
        "train, or go on with a run that has a checkpoint",
        "dist-transformer train configs/quickstart.yaml train.steps=200 optimizer.lr=1e-3",
        _train,
    )
    _add_config_arguments(train)


def _add_config_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG.yaml", help="the configuration")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="single fields over it")


def _add_generate(commands: _Commands) -> None:
    generate = _command(
        commands,
        "generate",
        "write targets for source lines, or fill the gaps (___) of a pretrained model's text",
        "echo 'A dog runs over the grass.' | dist-transformer generate runs/translate_multi30k",
        _generate,
    )
    _add_decoding(generate)
    generate.add_argument("--input", metavar="FILE", help="lines to read (default: standard input)")
    generate.add_argument("--output", metavar="FILE", help="lines to write (default: standard output)")


def _add_evaluate(commands: _Commands) -> None:
    evaluate = _command(
        commands,
        "evaluate",
        "score a run on text; prints one JSON object: bleu, chrf, signature, loss",
        "dist-transformer evaluate runs/translate_multi30k --source test.en --reference test.de",
        _evaluate,
    )
    _add_decoding(evaluate)
    evaluate.add_argument("--source", required=True, metavar="FILE", help="source lines")
    evaluate.add_argument("--reference", required=True, metavar="FILE", help="one reference a line")
    evaluate.add_argument("--output", metavar="FILE", help="write the decoded lines here too")


def _add_decoding(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", metavar="RUN_DIR", help="a run, or one of its checkpoints")
    parser.add_argument(
        "--beam-size", type=_positive, metavar="N", help="1 is greedy (default: the run's generate.beam_size)"
    )
    parser.add_argument(
        "--length-penalty", type=float, metavar="X", help="default: the run's generate.length_penalty"
    )
    parser.add_argument("--max-len", type=_positive, metavar="N", help="longest output in tokens")
    parser.add_argument("--batch-tokens", type=_positive, metavar="N", help="source tokens decoded together")
    parser.add_argument("--threads", type=_positive, metavar="N", help="CPU threads (default: all cores)")


def _add_report(commands: _Commands) -> None:
    report = _command(
        commands,
        "report",
        "draw one or several runs: loss, learning rate, speed",
        "dist-transformer report runs/a runs/b --png compare.png",
        _report,
    )
    report.add_argument("run_dirs", nargs="+", metavar="RUN_DIR", help="runs to draw")
    report.add_argument("--png", metavar="FILE", help="where to (default: RUN_DIR/report.png)")


def _add_config(commands: _Commands) -> None:
    check = _command(
        commands,
        "config",
        "check a configuration and print it with every default filled in",
        "dist-transformer config configs/quickstart.yaml train.steps=10",
        _config,
    )
    _add_config_arguments(check)
    check.add_argument("--field", metavar="section.key", help="print this field's value only")
    _command(commands, "presets", "list the model presets", "dist-transformer presets", _presets)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def _count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative")
    return value


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


def _train(options: argparse.Namespace) -> None:
    from dist_transformer.config import load_config

    config = load_config(options.config, options.overrides)
    from dist_transformer.train.trainer import train

    train(config)
    # Everything is written and every rank is done. What is left of gloo's and NCCL's threads may abort the
    # process while the interpreter takes them down ("terminate called without an active exception").
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _generate(options: argparse.Namespace) -> None:
    from dist_transformer.train.decode import generate_lines

    generate_lines(Path(options.run_dir), options.input, options.output, _decoding(options), options.threads)


def _evaluate(options: argparse.Namespace) -> None:
    import json

    from dist_transformer.train.decode import evaluate_files

    scores = evaluate_files(
        Path(options.run_dir),
        options.source,
        options.reference,
        options.output,
        _decoding(options),
        options.threads,
    )
    print(json.dumps(scores, ensure_ascii=False))


def _decoding(options: argparse.Namespace) -> dict[str, Any]:
    names = ("beam_size", "length_penalty", "max_len", "batch_tokens")
    return {name: value for name in names if (value := getattr(options, name)) is not None}


def _report(options: argparse.Namespace) -> None:
    from dist_transformer.tracking.report import draw_run

    run_dirs = [Path(path) for path in options.run_dirs]
    print(draw_run(run_dirs, Path(options.png) if options.png else run_dirs[0] / "report.png"))


def _config(options: argparse.Namespace) -> None:
    from dist_transformer.config import dump_config, load_config

    config = load_config(options.config, options.overrides)
    if options.field is None:
        print(dump_config(config), end="")
        return
    value: object = config
    for name in options.field.split("."):
        if name not in getattr(type(value), "model_fields", {}):
            raise ConfigError(f"--field {options.field}: there is no such field")
        value = getattr(value, name)
    print(value)


def _presets(_: argparse.Namespace) -> None:
    from dist_transformer.config import preset_names

    print("\n".join(preset_names()))
