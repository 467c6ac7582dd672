"""A run's model on text: `generate` on one process, from a checkpoint of any ZeRO stage."""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import find_executable_batch_size

from dist_transformer.errors import ConfigError, DataError
from dist_transformer.generate.spans import Filled, fill_texts
from dist_transformer.generate.text import Generated, continue_texts, describe_truncated, generate_texts
from dist_transformer.train.trained_run import Choice, TrainedRun


def generate_lines(
    path: Path,
    input_: str | None,
    output: str | None,
    decoding: Mapping[str, object],
    threads: int | None,
    choice: Choice | None = None,
) -> None:
    """Read lines, write one line for each: its gaps (`___`) filled by a denoising model, continued by one that was
    pretrained on prefixes, else the translation.
    """
    set_threads(threads)
    run = TrainedRun(path, choice)
    with contextlib.ExitStack() as stack:
        lines = read_lines(input_) if input_ else _read_stdin()
        destination = stack.enter_context(open(output, "w", encoding="utf-8")) if output else sys.stdout  # noqa: PTH123
        for text in decode_lines(run, lines, decoding):
            destination.write(f"{text}\n")


def decode_lines(run: TrainedRun, lines: Sequence[str], decoding: Mapping[str, object]) -> list[str]:
    """One output line for each input line; batches shrink where memory does not suffice."""
    config = run.config.generate.model_copy(update=dict(decoding))
    lengths: dict[str, Any] = {
        "max_source_len": run.config.data.max_source_len,
        "max_target_len": run.config.data.max_target_len,
    }
    write = _writer(run)

    @find_executable_batch_size(starting_batch_size=config.batch_tokens)  # type: ignore[untyped-decorator]
    def attempt(batch_tokens: int) -> Sequence[Generated | Filled]:
        return write(
            run.model,
            run.tokenizer,
            lines,
            config.model_copy(update={"batch_tokens": batch_tokens}),
            **lengths,
        )

    results: Sequence[Generated | Filled] = attempt()
    if warning := describe_truncated([result.n_cut for result in results], run.config.data.max_source_len):
        print(f"dist-transformer: {warning}", file=sys.stderr)
    # One line for one line, whatever the model writes.
    return [" ".join(result.text.splitlines()) for result in results]


def _writer(run: TrainedRun) -> Callable[..., Sequence[Generated | Filled]]:
    """What the run's model was trained to do with a text; that of the first corpus of a mixture."""
    data = run.config.data
    objective = data.corpora()[0].objective
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
    try:
        return list(_lines(Path(name)))
    except OSError as error:
        raise ConfigError(f"{name}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{name}: not UTF-8 at byte {error.start}") from None


def _read_stdin() -> list[str]:
    try:
        return [line.decode("utf-8").rstrip("\r\n") for line in sys.stdin.buffer]
    except UnicodeDecodeError as error:
        raise DataError(f"standard input: not UTF-8 at byte {error.start} of a line") from None


def _lines(path: Path) -> Iterator[str]:
    import gzip

    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as stream:
        for line in stream:
            yield line.decode("utf-8").rstrip("\r\n")


def set_threads(threads: int | None) -> None:
    torch.set_num_threads(threads or os.cpu_count() or 1)
