"""Work on all cores with progress that a person can read."""

import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.connection import wait
from typing import Any, TypeVar

from dist_transformer.errors import DataError

T = TypeVar("T")
R = TypeVar("R")

_PLAIN_INTERVAL_S = 10.0


class Workers:
    """Processes that live from the first task to the end of the `with` block; one means this process.

    They are spawned, never forked: the caller may hold threads. They end with this process, however it ends.
    """

    def __init__(self, n_workers: int) -> None:
        self.n_workers = n_workers
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def run(self, function: Callable[[T], R], tasks: Sequence[T]) -> Iterator[R]:
        """The results of tasks in the order in which they finish.

        Raises:
            DataError: a process was killed, or a task raised one.
        """
        if min(self.n_workers, len(tasks)) <= 1:
            yield from map(function, tasks)
            return
        if self._pool is None:
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(self.n_workers, mp_context=context, initializer=_prepare_worker)
        futures = [self._pool.submit(function, task) for task in tasks]
        try:
            for future in as_completed(futures):
                yield future.result()
        except BrokenProcessPool as error:
            raise DataError(
                "a preparation process was killed, often for want of memory: run the same command again "
                "with fewer --workers; what is done is kept"
            ) from error
        finally:
            for future in futures:
                future.cancel()


def _prepare_worker() -> None:
    # One process per core: threads of the tokenizer would only compete.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    exit_with_parent()


def exit_with_parent() -> None:
    """Let this process end at once when the one that started it does, even by SIGKILL.

    A thread waits for the pipe that the parent holds to close. Looking at the parent's id would not do: under
    a fork server the parent in the system's eyes is the server.
    """
    if (parent := multiprocessing.parent_process()) is not None:
        threading.Thread(target=_wait_and_exit, args=(parent.sentinel,), daemon=True).start()


def _wait_and_exit(sentinel: int) -> None:
    wait([sentinel])
    os._exit(1)


@contextmanager
def progress(title: str, total: int) -> Iterator[Callable[[int], Any]]:
    """Show how far a stage is: a bar on a terminal, a line every 10 s elsewhere; always on stderr.

    Yields:
        A function to call with the amount that was done.
    """
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description:<24}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"))
        with Progress(
            *columns, TimeElapsedColumn(), TimeRemainingColumn(), console=Console(stderr=True)
        ) as bar:
            stage = bar.add_task(title, total=max(total, 1))
            yield lambda amount: bar.advance(stage, amount)
            bar.update(stage, completed=max(total, 1))
        return
    started = shown = time.monotonic()
    done = 0

    def advance(amount: int) -> None:
        nonlocal done, shown
        done += amount
        if time.monotonic() - shown >= _PLAIN_INTERVAL_S:
            shown = time.monotonic()
            print(f"{title}: {100 * done / max(total, 1):.0f} %", file=sys.stderr, flush=True)

    yield advance
    print(f"{title}: done in {time.monotonic() - started:.1f} s", file=sys.stderr, flush=True)


def count_with(items: Iterable[T], advance: Callable[[int], Any], size: Callable[[T], int]) -> Iterator[T]:
    """Pass items on and advance the progress by the size of each."""
    for item in items:
        yield item
        advance(size(item))
