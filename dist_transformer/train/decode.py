"""A run's model on lines of text: from a checkpoint of any ZeRO stage, on one process."""

import codecs
import contextlib
import gzip
import os
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from accelerate.utils import release_memory
from accelerate.utils.memory import should_reduce_batch_size
from pydantic import ValidationError

from dist_transformer.config import GenerateConfig
from dist_transformer.errors import ConfigError, DataError
from dist_transformer.generate.spans import Filled, fill_texts
from dist_transformer.generate.text import (
    Generated,
    check_n_best,
    continue_texts,
    describe_cut_prefixes,
    describe_truncated,
    generate_texts,
)
from dist_transformer.train.trained_run import TrainedRun


class Line(NamedTuple):
    """One line of input."""

    number: int
    """From 0."""
    source: str
    prefix: str | None = None
    """What its output must begin with."""


class Decoded(NamedTuple):
    """What became of one line."""

    outputs: tuple[tuple[str, float], ...]
    """Texts and scores, best first or as they were drawn; one empty text for an empty line."""
    n_cut: int = 0
    """Tokens of the source that were left out."""
    n_prefix_cut: int = 0
    """Tokens of the prefix that were left out."""


class LineDecoder:
    """Does with a line what the run's model was trained to do: fills its gaps (`___`), continues it, or writes its
    target.

    Args:
        decoding: fields over the run's `generate` section.
        n_best: outputs wanted for each line.
        objective: which of a mixture's; None: its first corpus's.

    Raises:
        ConfigError: the fields do not fit together, or the run was not trained for the objective.
    """

    def __init__(
        self, run: TrainedRun, decoding: Mapping[str, object], n_best: int = 1, objective: str | None = None
    ) -> None:
        self._run, self._n_best = run, n_best
        fields = run.config.generate.model_dump() | dict(decoding)
        try:
            self._config = GenerateConfig.model_validate(fields)
        except ValidationError as error:
            problem = error.errors()[0]
            name = ".".join(["generate", *map(str, problem["loc"])])
            raise ConfigError(f"{name}: {problem['msg'].removeprefix('Value error, ')}") from None
        check_n_best(self._config, n_best)
        self._batch_tokens = self._config.batch_tokens
        self._write = _writer(run, objective)
        self.max_source_len = run.config.data.max_source_len

    def __call__(self, lines: Sequence[Line]) -> list[Decoded]:
        """What becomes of each line, in their order; batches shrink where memory does not suffice."""
        run, options = self._run, dict[str, Any](n_best=self._n_best)
        if any(line.prefix is not None for line in lines):
            if self._write not in (generate_texts, continue_texts):
                raise ConfigError("a model that fills gaps takes no prefixes: write the text around the gap")
            options["prefixes"] = [line.prefix or "" for line in lines]

        def attempt(batch_tokens: int) -> Sequence[Generated | Filled]:
            return self._write(
                run.scorer,
                run.tokenizer,
                [line.source for line in lines],
                self._config.model_copy(update={"batch_tokens": batch_tokens}),
                max_source_len=self.max_source_len,
                max_target_len=run.config.data.max_target_len,
                lines=[line.number for line in lines],
                **options,
            )

        results = self._within_memory(attempt)
        return [
            Decoded(
                result.alternatives or ((result.text, result.score),),
                result.n_cut,
                result.n_prefix_cut if isinstance(result, Generated) else 0,
            )
            for result in results
        ]

    def _within_memory(
        self, attempt: Callable[[int], Sequence[Generated | Filled]]
    ) -> Sequence[Generated | Filled]:
        """Try with as many tokens a batch as memory allowed so far, and with fewer where it does not suffice.

        accelerate's `find_executable_batch_size` would collect garbage before every window, which for a few short
        lines takes longer than decoding them, and would run out of memory anew in each.
        """
        while True:
            try:
                return attempt(self._batch_tokens)
            except RuntimeError as error:
                if not should_reduce_batch_size(error) or self._batch_tokens == 1:
                    raise
            # Out here, where the error and with it the frames that hold tensors are gone.
            release_memory()
            self._batch_tokens = max(1, self._batch_tokens // 2)


def describe_cuts(lines: Sequence[Line], decoded: Sequence[Decoded], max_source_len: int) -> list[str]:
    """Sentences about what was left out of neighbouring lines."""
    first_line = lines[0].number + 1 if lines else 1
    cut = describe_truncated([d.n_cut for d in decoded], max_source_len, first_line)
    cut_prefixes = describe_cut_prefixes([d.n_prefix_cut for d in decoded], first_line)
    return [sentence for sentence in (cut, cut_prefixes) if sentence]


def decode_lines(
    run: TrainedRun, lines: Sequence[str], decoding: Mapping[str, object], objective: str | None = None
) -> list[str]:
    """One output line for each input line; what was cut is said on stderr."""
    decoder = LineDecoder(run, decoding, objective=objective)
    numbered = [Line(i, line) for i, line in enumerate(lines)]
    decoded = decoder(numbered)
    for warning in describe_cuts(numbered, decoded, run.config.data.max_source_len):
        print(f"dist-transformer: {warning}", file=sys.stderr)
    return [one_line(d.outputs[0][0]) for d in decoded]


def one_line(text: str) -> str:
    """One line for one line, whatever the model writes."""
    return " ".join(text.splitlines())


def _writer(run: TrainedRun, objective: str | None) -> Callable[..., Sequence[Generated | Filled]]:
    """What the run's model was trained to do with a text; by default that of the first corpus of a mixture."""
    data = run.config.data
    trained = [str(corpus.objective) for corpus in data.corpora()]
    if objective is None:
        objective = trained[0]
    elif objective not in trained:
        raise ConfigError(
            f"--objective {objective}: this run was trained for {', '.join(dict.fromkeys(trained))}"
        )
    if objective == "pairs":
        return generate_texts
    if objective == "prefix_lm":
        return continue_texts
    if objective != "ul2":
        return fill_texts
    mode = next((denoiser.mode for denoiser in data.denoisers if denoiser.mode != "S"), "S")
    mode_id = run.tokenizer.mode_ids[mode] if data.mode_tokens else None
    return partial(continue_texts if mode == "S" else fill_texts, mode_id=mode_id)


def read_lines(name: str) -> list[str]:
    """Lines of a text file, without their ends."""
    return list(iterate_lines(name))


def iterate_lines(name: str | None) -> Iterator[str]:
    """Lines of a text file, `.gz` too, or of standard input (None), without their ends, as they are asked for.

    Raises:
        ConfigError: the file cannot be read.
        DataError: a line is not UTF-8.
    """
    where, n_read = name or "standard input", 0
    try:
        with contextlib.ExitStack() as stack:
            stream: IO[bytes] = sys.stdin.buffer
            if name is not None:
                path = Path(name)
                opened: Any = gzip.open(path) if path.suffix == ".gz" else path.open("rb")  # noqa: SIM115
                stream = stack.enter_context(opened)
            for line in stream:
                if n_read == 0:
                    line = line.removeprefix(codecs.BOM_UTF8)
                n_read += 1
                yield line.decode("utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 at byte {error.start} of line {n_read:,}") from None
    except (OSError, EOFError, zlib.error) as error:
        raise ConfigError(f"{where}: cannot be read: {getattr(error, 'strerror', None) or error}") from None


def set_threads(threads: int | None) -> None:
    torch.set_num_threads(threads or n_cores())


def n_cores() -> int:
    """Cores that this process may use: in a batch job, its share of the node."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
