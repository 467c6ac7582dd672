"""The progress that a person reads: one live line on a terminal, plain lines anywhere else.

Both go to standard output, since they are what `train` has to say; warnings of libraries stay apart on
standard error.
"""

import contextlib
import math
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import IO, Any

Values = Mapping[str, Any]


class Console:
    """Shows training and evaluation events on rank 0.

    `interactive=None` finds out whether the stream is a terminal. A broken pipe or a closed terminal
    silences the console and never raises: a run outlives whoever watches it. Methods may be called from
    several threads.
    """

    def __init__(
        self,
        total_steps: int,
        start_step: int = 0,
        interactive: bool | None = None,
        stream: IO[str] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stream = stream if stream is not None else sys.stdout
        self._total = total_steps
        self._lock = threading.RLock()
        self._eta = _StepClock(start_step, clock)
        self._broken = False
        if interactive is None:
            interactive = _is_terminal(self._stream)
        self._live = None
        if interactive:
            from dist_transformer.tracking.live import LiveLine

            self._live = LiveLine(self._stream, total_steps, start_step)

    def train(self, step: int, values: Values) -> None:
        """Show a training step: loss, learning rate, gradient norm, speed, time left."""
        with self._lock:
            self._eta.train(step, values.get("perf/step_time_s"))
            left_s = self._eta.left(self._total)
            fields = train_fields(values, left_s)
            if self._live is not None:
                self._guarded(self._live.update, step, fields)
            else:
                self._line("  ".join([f"step {step:,}/{self._total:,}", *fields.values()]))

    def evaluation(self, step: int, values: Values) -> None:
        """Show evaluation results, e.g. `eval at step 1,000  news loss 2.314  news bleu 21.3`."""
        with self._lock:
            self._eta.pause()
            shown = [
                f"{key.removeprefix('eval/').replace('/', ' ')} {_figure(value)}"
                for key, value in values.items()
                if key.startswith("eval/") and isinstance(value, int | float)
            ]
            self.message("  ".join([f"eval at step {step:,}", *shown]))

    def message(self, text: str) -> None:
        """Show a line of text, above the live line where there is one."""
        with self._lock:
            if self._live is not None:
                self._guarded(self._live.print, text)
            else:
                self._line(text)

    def pause(self) -> None:
        """Say that what follows (saving, generating) is no training: the time left ignores it."""
        with self._lock:
            self._eta.pause()

    def close(self) -> None:
        """Leave the terminal as it was found; the last state of the live line stays."""
        with self._lock:
            if self._live is not None:
                self._guarded(self._live.close)
                self._live = None

    def _line(self, text: str) -> None:
        self._guarded(lambda: print(text, file=self._stream, flush=True))

    def _guarded(self, call: Callable[..., None], *arguments: Any) -> None:
        if self._broken:
            return
        try:
            call(*arguments)
        except (OSError, ValueError):  # ValueError: the stream was closed.
            self._broken = True
            if self._live is not None:
                with contextlib.suppress(Exception):
                    self._live.close()
                self._live = None


class _StepClock:
    """Seconds a step, as a moving average that leaves out pauses."""

    def __init__(self, start_step: int, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._step = start_step
        self._then: float | None = None
        self._seconds: float | None = None
        self._n_reports = 0

    def train(self, step: int, step_time: Any) -> None:
        now = self._clock()
        n_steps = step - self._step
        measured: float | None = None
        if isinstance(step_time, int | float) and math.isfinite(step_time) and step_time > 0:
            measured = float(step_time)
        elif self._then is not None and n_steps > 0:
            measured = (now - self._then) / n_steps
        if measured is not None:
            # About the last ten reports count. The first holds the start (loader, caches): it serves until there
            # is a second one, and is then forgotten.
            is_early = self._seconds is None or self._n_reports == 1
            self._seconds = measured if is_early else 0.9 * (self._seconds or 0.0) + 0.1 * measured
            self._n_reports += 1
        self._step, self._then = step, now

    def pause(self) -> None:
        self._then = None

    def left(self, total: int) -> float | None:
        return None if self._seconds is None else max(0, total - self._step) * self._seconds


def train_fields(values: Values, left_s: float | None) -> dict[str, str]:
    """What is shown of a training step, most important first; what is missing is left out."""
    fields: dict[str, str] = {}
    if (loss := _number(values, "train/loss")) is not None:
        fields["loss"] = f"loss {loss:.3f}"
    if (lr := _number(values, "train/lr")) is not None:
        fields["lr"] = f"lr {lr:.1e}"
    if (norm := _number(values, "train/grad_norm")) is not None:
        fields["gnorm"] = f"gnorm {norm:.2f}"
    if (speed := _number(values, "perf/tokens_per_sec")) is not None:
        fields["speed"] = f"{human_count(speed)} tok/s"
    if left_s is not None:
        fields["eta"] = f"eta {human_time(left_s)}"
    return fields


def human_count(number: float) -> str:
    """12345 as `12.3k`: three digits and a unit."""
    if not math.isfinite(number):
        return str(number)
    for unit in ("", "k", "M", "G", "T"):
        # 999.95 rounds to four digits and belongs to the next unit.
        if abs(number) < 999.5 or unit == "T":
            break
        number /= 1000
    digits = 0 if unit == "" or abs(number) >= 99.95 else 1 if abs(number) >= 9.995 else 2
    return f"{number:.{digits}f}{unit}"


def human_time(seconds: float) -> str:
    """200 as `3m 20s`: the two largest units."""
    if not math.isfinite(seconds):
        return "?"
    total = round(seconds)
    days, hours, minutes = total // 86400, total // 3600 % 24, total // 60 % 60
    if days:
        return f"{days}d {hours}h"
    if hours:
        return f"{hours}h {minutes:02d}m"
    if minutes:
        return f"{minutes}m {total % 60:02d}s"
    return f"{total}s"


def _number(values: Values, key: str) -> float | None:
    value = values.get(key)
    return float(value) if isinstance(value, int | float) else None


def _figure(value: float) -> str:
    return (
        f"{value:,}" if isinstance(value, int) else f"{value:.4g}" if abs(value) >= 1000 else f"{value:.3f}"
    )


def _is_terminal(stream: IO[str]) -> bool:
    try:
        return stream.isatty()
    except ValueError:
        return False
