"""The command `generate`, and the options about weights and decoding that other commands share with it."""

import argparse
from pathlib import Path
from typing import Any

from dist_transformer.cli.parsing import OBJECTIVES, WEIGHTS, Commands, add_command, not_negative, positive
from dist_transformer.errors import ConfigError

_SEARCH = (
    "beam_size",
    "length_penalty",
    "stop",
    "max_len",
    "min_len",
    "max_ratio",
    "max_extra",
    "batch_tokens",
)
_SAMPLING = ("sample", "temperature", "top_k", "top_p", "seed")


def add_weights(parser: argparse.ArgumentParser) -> None:
    """Options that say which of a run's weights are meant; `choice_of` reads them."""
    parser.add_argument(
        "--checkpoint",
        metavar="WHICH",
        help="latest, best, a step, or a folder's name in RUN_DIR/checkpoints (default: latest)",
    )
    parser.add_argument(
        "--weights",
        choices=WEIGHTS,
        help="the trained weights, or their moving average (default: as the run evaluates)",
    )
    parser.add_argument("--average", type=positive, metavar="N", help="the mean of the N newest checkpoints")


def add_decoding(parser: argparse.ArgumentParser) -> None:
    """Which run, and options over its section `generate`; `decoding_of` reads the latter."""
    parser.add_argument("run_dir", metavar="RUN_DIR", help="a run, or one of its checkpoints")
    add_weights(parser)
    parser.add_argument(
        "--ensemble",
        nargs="+",
        default=[],
        metavar="RUN_DIR",
        help="further runs with the same tokenizer: all decode together, by the mean of their probabilities",
    )
    parser.add_argument(
        "--objective",
        choices=OBJECTIVES,
        help="of a run that was trained for several: which (default: `generate` its first, `evaluate` pairs)",
    )
    parser.add_argument(
        "--beam-size", type=positive, metavar="N", help="1 is greedy (default: the run's generate.beam_size)"
    )
    parser.add_argument(
        "--length-penalty", type=float, metavar="X", help="default: the run's generate.length_penalty"
    )
    parser.add_argument(
        "--stop",
        choices=("estimate", "exact", "first"),
        help="when a beam ends (default: the run's generate.stop)",
    )
    parser.add_argument("--max-len", type=positive, metavar="N", help="longest output in tokens")
    parser.add_argument("--min-len", type=not_negative, metavar="N", help="shortest output in tokens")
    parser.add_argument(
        "--max-ratio", type=float, metavar="X", help="longest output also: X x source tokens + --max-extra"
    )
    parser.add_argument("--max-extra", type=not_negative, metavar="N", help="see --max-ratio")
    parser.add_argument("--batch-tokens", type=positive, metavar="N", help="source tokens decoded together")
    parser.add_argument("--threads", type=positive, metavar="N", help="CPU threads (default: all cores)")


def add_generate(commands: Commands) -> None:
    """The command."""
    generate = add_command(
        commands,
        "generate",
        "write targets for source lines, or fill the gaps (___) of a pretrained model's text",
        "echo 'A dog runs over the grass.' | dist-transformer generate runs/translate_multi30k",
        _generate,
    )
    add_decoding(generate)
    group = generate.add_argument_group("sampling")
    group.add_argument("--sample", action="store_true", default=None, help="draw outputs, do not search")
    group.add_argument("--temperature", type=float, metavar="X", help="below 1: likely tokens likelier")
    group.add_argument("--top-k", type=not_negative, metavar="N", help="of the N likeliest tokens; 0: of all")
    group.add_argument("--top-p", type=float, metavar="P", help="of the likeliest that sum to P")
    group.add_argument("--seed", type=not_negative, metavar="N", help="same seed, same line: same sample")
    group = generate.add_argument_group("lines")
    group.add_argument("--input", metavar="FILE", help="lines to read (default: standard input)")
    group.add_argument("--output", metavar="FILE", help="lines to write (default: standard output)")
    group.add_argument("--prefix-file", metavar="FILE", help="a line for each: what its output begins with")
    group.add_argument(
        "--tab-prefixes", action="store_true", help="what stands behind a line's first tab is its prefix"
    )
    group.add_argument("--n-best", type=positive, default=1, metavar="N", help="outputs, or samples, a line")
    group.add_argument("--scores", action="store_true", help="write each output's score before it")
    group.add_argument("--json", action="store_true", help="write a JSON object a line, with all scores")
    group.add_argument(
        "--window",
        type=positive,
        default=2048,
        metavar="N",
        help="lines read, decoded and written at a time: 1 answers each at once, more are faster (default: 2048)",
    )
    group.add_argument(
        "--nproc",
        type=positive,
        default=1,
        metavar="N",
        help="processes that share the lines, each with the model",
    )


def _generate(options: argparse.Namespace) -> None:
    if options.prefix_file and options.tab_prefixes:
        raise ConfigError("--prefix-file and --tab-prefixes are two ways to give one thing: choose")
    from dist_transformer.train.generate_lines import Model, Reading, Writing, generate_lines

    model = Model(
        Path(options.run_dir),
        decoding_of(options),
        choice_of(options),
        options.n_best,
        options.threads,
        options.objective,
    )
    generate_lines(
        model,
        Reading(options.input, options.prefix_file, options.tab_prefixes, options.window),
        Writing(options.output, options.n_best, options.scores, options.json),
        options.nproc,
    )


def choice_of(options: argparse.Namespace) -> Any:
    """The weights that `add_weights`'s options name: a `train.trained_run.Choice`."""
    from dist_transformer.train.trained_run import Choice

    others = tuple(map(Path, getattr(options, "ensemble", [])))
    return Choice(options.checkpoint, options.weights, options.average, others)


def decoding_of(options: argparse.Namespace) -> dict[str, Any]:
    """The fields of the section `generate` that were given."""
    given = ((name, getattr(options, name, None)) for name in (*_SEARCH, *_SAMPLING))
    return {name: value for name, value in given if value is not None}
