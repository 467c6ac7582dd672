"""The command `generate`: lines in, lines out, a window at a time, on one process or several."""

import contextlib
import itertools
import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO

import torch

from dist_transformer.data.pool import exit_with_parent
from dist_transformer.errors import ConfigError, DataError
from dist_transformer.train.decode import (
    Decoded,
    Line,
    LineDecoder,
    describe_cuts,
    iterate_lines,
    one_line,
    set_threads,
)
from dist_transformer.train.trained_run import Choice, TrainedRun


@dataclass(frozen=True)
class Reading:
    """Where lines come from. Both files are read as far as is needed, never whole."""

    source: str | None = None
    """A file; None: standard input."""
    prefix_file: str | None = None
    """A line for each source line, with which its output must begin."""
    tab_prefixes: bool = False
    """A source line holds its prefix behind its first tab."""
    window: int = 2048
    """Lines that are read, decoded and written before the next are read."""


@dataclass(frozen=True)
class Writing:
    """What is written for each line."""

    output: str | None = None
    """A file; None: standard output."""
    n_best: int = 1
    scores: bool = False
    json_lines: bool = False


@dataclass(frozen=True)
class Model:
    """Which model decodes, and how; what a worker process is told."""

    path: Path
    decoding: Mapping[str, object]
    choice: Choice | None = None
    n_best: int = 1
    threads: int | None = None


def generate_lines(model: Model, reading: Reading, writing: Writing, nproc: int = 1) -> None:
    """Write the outputs of each line, in the order of the lines.

    Memory holds one window and the model, whatever the length of the input. A window's outputs are written and
    flushed before the next window is read.

    Args:
        nproc: processes among which a window's lines are dealt out; each holds the model.

    Raises:
        ConfigError: options that do not fit, before anything is read.
        DataError: input that cannot be read; the windows before it are written.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            "every process of a launcher would decode all lines: start one `generate`, with --nproc N"
        )
    with contextlib.ExitStack() as stack:
        decode = stack.enter_context(_workers(model, nproc)) if nproc > 1 else _load(model)
        destination: TextIO = sys.stdout
        if writing.output:
            try:
                destination = stack.enter_context(Path(writing.output).open("w", encoding="utf-8"))
            except OSError as error:
                raise ConfigError(f"{writing.output}: cannot be written: {error.strerror}") from None
        for window in _windows(reading):
            decoded, max_source_len = decode(window)
            for warning in describe_cuts(window, decoded, max_source_len):
                print(f"dist-transformer: {warning}", file=sys.stderr)
            for line, found in zip(window, decoded, strict=True):
                destination.writelines(f"{row}\n" for row in format_line(line, found, writing))
            destination.flush()


def format_line(line: Line, decoded: Decoded, writing: Writing) -> Iterator[str]:
    """The rows for one line: docs/decoding.md."""
    if writing.json_lines:
        outputs = [{"text": text, "score": round(score, 6)} for text, score in decoded.outputs]
        yield json.dumps({"line": line.number + 1, "outputs": outputs}, ensure_ascii=False)
        return
    for text, score in decoded.outputs:
        fields = [str(line.number + 1)] if writing.n_best > 1 else []
        fields += [f"{score:.4f}"] if writing.scores else []
        text = one_line(text)
        yield "\t".join([*fields, text.replace("\t", " ")]) if fields else text


def _windows(reading: Reading) -> Iterator[list[Line]]:
    lines = _lines(reading)
    while window := list(itertools.islice(lines, reading.window)):
        yield window


def _lines(reading: Reading) -> Iterator[Line]:
    sources = iterate_lines(reading.source)
    if reading.prefix_file is not None:
        where = reading.source or "standard input"
        both = itertools.zip_longest(sources, iterate_lines(reading.prefix_file))
        for number, (source, prefix) in enumerate(both):
            if source is None or prefix is None:
                short, long = (where, reading.prefix_file) if source is None else (reading.prefix_file, where)
                raise DataError(
                    f"{short} ends after {number:,} lines and {long} does not: they must be parallel"
                )
            yield Line(number, source, prefix)
        return
    for number, text in enumerate(sources):
        if reading.tab_prefixes:
            source, _, prefix = text.partition("\t")
            yield Line(number, source, prefix)
        else:
            yield Line(number, text)


_Decode = Callable[[Sequence[Line]], tuple[list[Decoded], int]]
"""Lines to what became of them, and the longest source that the model takes."""


def _load(model: Model) -> _Decode:
    set_threads(model.threads)
    decoder = LineDecoder(TrainedRun(model.path, model.choice), model.decoding, model.n_best)
    return lambda lines: (decoder(lines), decoder.max_source_len)


@contextlib.contextmanager
def _workers(model: Model, nproc: int) -> Iterator[_Decode]:
    """The same by several processes. A window is dealt out by length, so that all have as much to do."""
    context = multiprocessing.get_context("spawn")
    threads = model.threads or max(1, (os.cpu_count() or 1) // nproc)
    pool = ProcessPoolExecutor(
        nproc,
        mp_context=context,
        initializer=_prepare,
        initargs=(replace(model, threads=threads), context.Value("i", 0)),
    )

    def decode(lines: Sequence[Line]) -> tuple[list[Decoded], int]:
        by_length = sorted(lines, key=lambda line: -len(line.source))
        shares = [by_length[i::nproc] for i in range(min(nproc, len(by_length)))]
        results = list(pool.map(_decode_share, shares))
        found = {
            line.number: one
            for share, (decoded, _) in zip(shares, results, strict=True)
            for line, one in zip(share, decoded, strict=True)
        }
        return [found[line.number] for line in lines], results[0][1]

    try:
        yield decode
    except BrokenProcessPool:
        raise DataError(
            "a decoding process was killed, often for want of memory: use fewer --nproc or --batch-tokens"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


class _Worker:
    """What a worker process keeps."""

    model: Model
    decode: _Decode | None = None


def _prepare(model: Model, counter: Any) -> None:
    exit_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers
    _Worker.model = model
    with counter.get_lock():
        index = counter.value
        counter.value += 1
    if torch.cuda.is_available():
        torch.cuda.set_device(index % torch.cuda.device_count())


def _decode_share(share: Sequence[Line]) -> tuple[list[Decoded], int]:
    if _Worker.decode is None:  # here, and not in `_prepare`: what goes wrong comes back as the task's error
        _Worker.decode = _load(_Worker.model)
    return _Worker.decode(share)
