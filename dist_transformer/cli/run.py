"""Commands about runs: train, generate, evaluate, report, and their configuration."""

import argparse
import os
import sys
from argparse import BooleanOptionalAction
from pathlib import Path

from dist_transformer.cli.generate import add_decoding, add_generate, choice_of, decoding_of
from dist_transformer.cli.parsing import METRICS, TOKENIZERS, Commands, add_command
from dist_transformer.errors import ConfigError


def add_runs(commands: Commands) -> None:
    """The commands of this module."""
    _add_train(commands)
    add_generate(commands)
    _add_evaluate(commands)
    _add_report(commands)
    _add_config(commands)


def _add_train(commands: Commands) -> None:
    train = add_command(
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


def _add_evaluate(commands: Commands) -> None:
    evaluate = add_command(
        commands,
        "evaluate",
        "score a run on text; prints one JSON object, or with --out writes it and prints a table",
        "dist-transformer evaluate runs/translate_multi30k --source test.en --reference test.de --metrics bleu,chrf",
        _evaluate,
    )
    add_decoding(evaluate)
    evaluate.add_argument("--source", required=True, metavar="FILE", help="source lines")
    evaluate.add_argument(
        "--reference",
        required=True,
        nargs="+",
        metavar="FILE",
        help="one reference a line; several: of each source",
    )
    evaluate.add_argument("--output", metavar="FILE", help="write the decoded lines here too")
    evaluate.add_argument("--out", metavar="FILE", help="write the JSON object here, and print a table")
    own = "(default: the run's evaluate"
    evaluate.add_argument(
        "--metrics",
        type=_metrics,
        metavar="A,B,..",
        help=f"{', '.join(METRICS)} {own}.metrics)",
    )
    evaluate.add_argument(
        "--tokenize",
        choices=TOKENIZERS,
        help=f"BLEU's tokenizer; none: text is tokenised {own}.tokenize)",
    )
    evaluate.add_argument(
        "--lowercase", action=BooleanOptionalAction, help=f"score in lower case {own}.lowercase)"
    )
    evaluate.add_argument(
        "--group-sources",
        action=BooleanOptionalAction,
        help=f"consecutive equal sources are one, with the references of all of them {own}.group_sources)",
    )
    evaluate.add_argument(
        "--ignore",
        type=_expression,
        metavar="REGEX",
        help=f"what it matches, in outputs and references, does not count {own}.ignore)",
    )


def _expression(text: str) -> str:
    from dist_transformer.config.evaluate import check_expression

    try:
        check_expression(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def _metrics(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    if not names or (unknown := [name for name in names if name not in METRICS]):
        what = f"no metric {unknown[0]}" if names else "no metric given"
        raise argparse.ArgumentTypeError(f"{what}: there are {', '.join(METRICS)}")
    return names


def _add_report(commands: Commands) -> None:
    report = add_command(
        commands,
        "report",
        "write a page about one or several runs: curves, course, figures, samples; it needs no network",
        "dist-transformer report runs/a runs/b --out compare.html --png compare.png",
        _report,
    )
    report.add_argument("run_dirs", nargs="+", metavar="RUN_DIR", help="runs to show")
    report.add_argument(
        "--out",
        metavar="FILE",
        help="where to (default: RUN_DIR/report.html; RUN_DIR/comparison.html for several)",
    )
    report.add_argument("--png", metavar="FILE", help="draw the main curves as a picture too")


def _add_config(commands: Commands) -> None:
    check = add_command(
        commands,
        "config",
        "check a configuration and print it with every default filled in",
        "dist-transformer config configs/quickstart.yaml train.steps=10",
        _config,
    )
    _add_config_arguments(check)
    check.add_argument("--field", metavar="section.key", help="print this field's value only")
    add_command(commands, "presets", "list the model presets", "dist-transformer presets", _presets)


def _train(options: argparse.Namespace) -> None:
    from dist_transformer.config import load_config

    config = load_config(options.config, options.overrides)
    from dist_transformer.data.fork_server import start_fork_server

    if config.data.workers:
        start_fork_server()  # before the import of torch: the two go on side by side
    from dist_transformer.train.trainer import train

    train(config)
    # Everything is written and every rank is done. What is left of gloo's and NCCL's threads may abort the
    # process while the interpreter takes them down ("terminate called without an active exception").
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _evaluate(options: argparse.Namespace) -> None:
    import json

    from dist_transformer.train.scores import Scoring, check_writable, evaluate_files, table, write_result

    if options.out is not None:
        check_writable("--out", options.out, [options.source, *options.reference])
    scores = evaluate_files(
        Path(options.run_dir),
        options.source,
        options.reference,
        options.output,
        decoding_of(options),
        options.threads,
        Scoring(options.metrics, options.tokenize, options.lowercase, options.group_sources, options.ignore),
        choice_of(options),
        options.objective,
    )
    if options.out is None:
        print(json.dumps(scores, ensure_ascii=False))
    else:
        write_result(scores, Path(options.out))
        print(table(scores))


def _report(options: argparse.Namespace) -> None:
    from dist_transformer.tracking.page import write_report

    run_dirs = [Path(path) for path in options.run_dirs]
    name = "report.html" if len(run_dirs) == 1 else "comparison.html"
    print(write_report(run_dirs, Path(options.out) if options.out else run_dirs[0] / name))
    if options.png:
        from dist_transformer.tracking.report import draw_run

        print(draw_run(run_dirs, Path(options.png)))


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
