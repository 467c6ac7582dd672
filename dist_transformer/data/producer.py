"""A process that produces values ahead of who reads them: loader workers, without torch.

`torch.utils.data.DataLoader` did this before. Its workers import torch, which they have no use for: two seconds of CPU
and much memory for the fork server of each rank, while the ranks import it too (docs/log.md).
"""

import os
import queue
import signal
import threading
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from multiprocessing.util import Finalize
from typing import Any

from dist_transformer.data.fork_server import SHIELDED, start_fork_server
from dist_transformer.data.pool import exit_with_parent
from dist_transformer.errors import DataError

_END_S = 5.0
"""How long a process that closed its end may take to be gone."""


class Producer:
    """Values of an iterator that runs in a process of its own, which starts at once.

    Args:
        produce: makes the iterator in that process; it and its arguments are pickled.
        ahead: values that wait there to be read, at most, beside one that is on its way and one that is just made.

    Raises:
        DataError: the process cannot be started.
    """

    def __init__(self, produce: Callable[..., Iterator[Any]], *arguments: Any, ahead: int) -> None:
        start_fork_server()
        context = get_context("forkserver")
        self._values, theirs = context.Pipe(duplex=False)
        self._process = context.Process(target=_run, args=(theirs, ahead, produce, arguments), daemon=True)
        try:
            self._process.start()
        except (EOFError, OSError) as error:
            raise DataError(_died(f"it could not be started: {error}")) from None
        theirs.close()  # the process alone has it now: its death is the end of the pipe
        # The interpreter's end would wait for it: it blocks the signal that it would be ended with then.
        self._end = Finalize(self, _kill, args=(self._process, self._values), exitpriority=10)

    def next(self) -> Any:
        """The next value.

        Raises:
            DataError: the iterator raised it, or the process died.
            RuntimeError: the iterator raised anything else, with the traceback of there.
        """
        try:
            value = self._values.recv()
        except (EOFError, OSError):
            self._process.join(_END_S)
            raise DataError(_died(_reason(self._process.exitcode))) from None
        if isinstance(value, DataError):
            raise value
        if isinstance(value, _Bug):
            raise RuntimeError(f"in a loader worker:\n{value.traceback}")
        return value

    def close(self) -> None:
        """End the process, whatever it does: what it made ahead is lost."""
        self._end()


@dataclass(frozen=True)
class _Bug:
    """An exception that nobody foresaw."""

    traceback: str


def _kill(process: BaseProcess, values: Connection) -> None:
    values.close()
    if process.is_alive():  # another process may have the number of a dead one
        process.kill()
    process.join(_END_S)  # one that waits for a dead disk cannot be killed


def _died(reason: str) -> str:
    advice = "if the machine ran out of memory, lower data.workers or data.window_tokens"
    return f"a loader worker died ({reason}); {advice}"


def _reason(exit_code: int | None) -> str:
    if exit_code is not None and exit_code < 0:
        known = {number.value: number.name for number in signal.Signals}
        return f"killed by {known.get(-exit_code, f'signal {-exit_code}')}"
    return f"exit code {exit_code}"


def _run(values: Connection, ahead: int, produce: Callable[..., Iterator[Any]], arguments: Any) -> None:
    """The process: one thread produces, one sends."""
    # Another library may have started the fork server before us, without the mask.
    signal.pthread_sigmask(signal.SIG_BLOCK, SHIELDED)
    # Of raw shards, text is tokenised here: a worker is one core's work.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    exit_with_parent()
    waiting: queue.Queue[Any] = queue.Queue(ahead)
    sender = threading.Thread(target=_send, args=(values, waiting), daemon=True)
    sender.start()
    try:
        for value in produce(*arguments):
            waiting.put(value)
    except DataError as error:
        waiting.put(DataError(str(error)))  # without the frames that it was raised in
    except MemoryError:
        waiting.put(DataError(_died("out of memory")))
    except Exception:
        waiting.put(_Bug(traceback.format_exc()))
    waiting.put(None)
    sender.join()


def _send(values: Connection, waiting: "queue.Queue[Any]") -> None:
    while (value := waiting.get()) is not None:
        try:
            values.send(value)
        except OSError:  # nobody reads any more
            os._exit(0)
        except BaseException:  # the thread alone would end, and its reader wait for ever
            traceback.print_exc()
            os._exit(1)
