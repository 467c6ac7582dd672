"""What may go wrong while training, and the answer: signals, and updates that are not finite."""

import signal
from collections.abc import Sequence
from types import FrameType

from dist_transformer.errors import DivergenceError


class StopSignals:
    """Remembers a request to stop (SIGTERM, SIGUSR1, SIGINT), so that the loop can save and leave between steps.

    A second SIGINT interrupts at once, for a person at a terminal.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self._remember)

    def learn(self, of_ranks: Sequence[str | None]) -> None:
        """Take over what another rank received, where this one received nothing."""
        self.received = self.received or next(filter(None, of_ranks), None)

    def _remember(self, number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT and self.received == "SIGINT":
            raise KeyboardInterrupt
        self.received = signal.Signals(number).name


class BadSteps:
    """Counts updates that were skipped for a non-finite loss or gradient; too many in a row end the run."""

    def __init__(self, limit: int, n_before: int = 0) -> None:
        self.limit, self.total, self.in_a_row = limit, n_before, 0

    def record(self, applied: bool) -> None:
        """Count one update."""
        self.in_a_row = 0 if applied else self.in_a_row + 1
        self.total += not applied

    def check(self, step: int) -> None:
        """Raises:
        DivergenceError: after `limit` bad updates in a row.
        """
        if self.in_a_row >= self.limit:
            error = DivergenceError(
                f"step {step}: loss or gradient was not finite in {self.in_a_row} updates in a row: "
                f"the run has diverged. Go on from the last checkpoint with a lower optimizer.lr or a longer warm-up"
            )
            error.on_every_rank = True  # One rank's sentence is enough.
            raise error
