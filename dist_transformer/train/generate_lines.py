"""The command `generate`: lines in, lines out, a window at a time, on one process or several."""

import contextlib
import errno
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
    n_cores,
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
    objective: str | None = None


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
    n_tasks = int(os.environ.get("SLURM_NTASKS", "1")) if "SLURM_STEP_ID" in os.environ else 1
    if max(n_tasks, int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        raise ConfigError(
            "every process of a launcher would decode all lines: start one `generate`, with --nproc N"
        )
    _check_files(reading, writing)
    with contextlib.ExitStack() as stack:
        decode = stack.enter_context(_workers(model, nproc)) if nproc > 1 else _load(model)
        write = stack.enter_context(_destination(writing.output))
        for window in _windows(reading):
            decoded, max_source_len = decode(window)
            for warning in describe_cuts(window, decoded, max_source_len):
                print(f"dist-transformer: {warning}", file=sys.stderr)
            write(
                [
                    f"{row}\n"
                    for line, found in zip(window, decoded, strict=True)
                    for row in format_line(line, found, writing)
                ]
            )
        write([])


def _check_files(reading: Reading, writing: Writing) -> None:
    """Refuse to write over what is read."""
    for name in filter(None, (reading.source, reading.prefix_file)):
        path, out = Path(name), Path(writing.output or "")
        if not path.exists():
            raise ConfigError(f"{name}: cannot be read: {os.strerror(errno.ENOENT)}")
        if writing.output and out.exists() and out.samefile(path):
            raise ConfigError(f"--output {writing.output} is a file that is read: give another one")


@contextlib.contextmanager
def _destination(output: str | None) -> Iterator[Callable[[Sequence[str]], None]]:
    """Writes rows and flushes. A file that was there keeps what it held until the first window is decoded."""
    where = output or "standard output"
    file: TextIO = sys.stdout
    is_new, has_begun = output is not None and not Path(output).exists(), False
    if output is not None:
        try:
            file = Path(output).open("a", encoding="utf-8")  # noqa: SIM115
        except OSError as error:
            raise ConfigError(f"{where}: cannot be written: {error.strerror}") from None

    def write(rows: Sequence[str]) -> None:
        nonlocal has_begun
        try:
            if not has_begun and output is not None and Path(output).is_file():
                file.truncate(0)
            has_begun = True
            file.writelines(rows)
            file.flush()
        except BrokenPipeError:
            raise
        except OSError as error:
            raise DataError(f"{where}: cannot be written: {error.strerror or error}") from None

    try:
        yield write
    finally:
        if output is not None:
            with contextlib.suppress(OSError):  # said already
                file.close()
            if is_new and not has_begun:
                Path(output).unlink(missing_ok=True)


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
    decoder = LineDecoder(TrainedRun(model.path, model.choice), model.decoding, model.n_best, model.objective)
    return lambda lines: (decoder(lines), decoder.max_source_len)


@contextlib.contextmanager
def _workers(model: Model, nproc: int) -> Iterator[_Decode]:
    """The same by several processes. A window is dealt out by length, so that all have as much to do."""
    context = multiprocessing.get_context("spawn")
    threads = model.threads or max(1, n_cores() // nproc)
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
