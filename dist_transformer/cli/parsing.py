"""What all commands share: a parser whose errors are one sentence, and types of numbers."""

import argparse
from collections.abc import Callable
from typing import Any, NoReturn, TypeAlias

# As `config.evaluate` has them (a test compares): importing the configuration would slow every --help down.
METRICS = (
    "bleu", "chrf", "exact_match", "rouge_l", "wer", "cer", "per", "token_accuracy", "sequence_accuracy",
)  # fmt: skip
TOKENIZERS = ("13a", "none", "intl", "char", "zh")
WEIGHTS = ("current", "ema")
OBJECTIVES = ("pairs", "span_corruption", "ul2", "prefix_lm")


class Parser(argparse.ArgumentParser):
    """Wrong arguments are one sentence and exit code 2, as wrong configuration is."""

    _is_parsing = False

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Options may stand between arguments: argparse alone takes `CONFIG --rows 2 data.window=8` for a mistake."""
        if self._subparsers is not None or self._is_parsing:
            return super().parse_known_args(args, namespace)
        self._is_parsing = True  # what is called next calls this again, for options and for the rest
        try:
            return self.parse_known_intermixed_args(args, namespace)
        finally:
            self._is_parsing = False

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


Commands: TypeAlias = "argparse._SubParsersAction[Parser]"


def add_command(
    commands: Commands, name: str, help_: str, example: str, run: Callable[[argparse.Namespace], None] | None
) -> Parser:
    """A command with an example below its help; `run` gets the parsed options (None: it has commands of its own)."""
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


def positive(text: str) -> int:
    """An integer of 1 or more, for `type=`."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def not_negative(text: str) -> int:
    """An integer of 0 or more, for `type=`."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative")
    return value
