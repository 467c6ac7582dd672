"""The rows of `metrics.jsonl` as curves over steps."""

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dist_transformer.errors import UserError
from dist_transformer.tracking.jsonl import FILE_NAME, Row
from dist_transformer.tracking.metrics import read_metrics


@dataclass
class Curve:
    """Values over steps, in the order of steps."""

    steps: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)

    def add(self, step: int, value: float) -> None:
        """Append a point."""
        self.steps.append(step)
        self.values.append(value)

    def finite(self) -> "Curve":
        """Only the points whose value is a number."""
        points = [(s, v) for s, v in zip(self.steps, self.values, strict=True) if math.isfinite(v)]
        return Curve([step for step, _ in points], [value for _, value in points])

    def nonfinite_steps(self) -> list[int]:
        """The steps of the other points."""
        return [s for s, v in zip(self.steps, self.values, strict=True) if not math.isfinite(v)]

    def at(self, step: float) -> float:
        """The value at a step between the first and the last, interpolated."""
        right = bisect.bisect_left(self.steps, step)
        if right < len(self.steps) and self.steps[right] == step:
            return self.values[right]
        right = min(max(right, 1), len(self.steps) - 1)
        (x0, x1), (y0, y1) = self.steps[right - 1 : right + 1], self.values[right - 1 : right + 1]
        return y0 + (y1 - y0) * (step - x0) / (x1 - x0)


@dataclass
class RunCurves:
    """Everything that is drawn of one run."""

    name: str
    scalars: dict[str, Curve]
    """By metric name; training metrics from training rows, `eval/...` from evaluation rows."""
    eval_losses: dict[str, Curve]
    """By the name of the evaluation set."""
    tokens: Curve
    """Tokens seen."""
    restart_steps: list[int]
    """First logged step of each process but the first."""
    n_restarts: int
    last_step: int


def load_curves(run_dir: Path, name: str) -> RunCurves:
    """Read a run's curves; steps that were replayed after a restart count once."""
    every_row = read_metrics(run_dir)
    rows = read_metrics(run_dir, last_wins=True)
    wanted = {"train": "", "eval": "eval/"}
    scalars: dict[str, Curve] = {}
    tokens = Curve()
    for row in rows:
        prefix = wanted.get(row["event"])
        if prefix is None:
            continue
        for key, value in row.items():
            if "/" in key and key.startswith(prefix) and isinstance(value, int | float):
                scalars.setdefault(key, Curve()).add(row["step"], float(value))
        if row["event"] == "train" and isinstance(row.get("trainer/tokens_seen"), int | float):
            tokens.add(row["step"], float(row["trainer/tokens_seen"]))
    if not scalars:
        raise UserError(
            f"{run_dir / FILE_NAME} has no training or evaluation rows yet: there is nothing to draw"
        )
    eval_losses = {
        key.removeprefix("eval/").removesuffix("loss").rstrip("/"): curve
        for key, curve in scalars.items()
        if key.startswith("eval/") and key.endswith("/loss")
    }
    restarts = _restart_steps(every_row)
    return RunCurves(
        name=name,
        scalars=scalars,
        eval_losses=eval_losses,
        tokens=tokens,
        restart_steps=restarts,
        n_restarts=len(restarts),
        last_step=max(row["step"] for row in rows),
    )


def smooth(values: Sequence[float], share: float = 0.04) -> list[float]:
    """An exponential moving average over about `share` of the points, without the pull of its start value."""
    span = max(2.0, share * len(values))
    decay = 1 - 1 / span
    average, weight, result = 0.0, 0.0, []
    for value in values:
        average = decay * average + (1 - decay) * value
        weight = decay * weight + (1 - decay)
        result.append(average / weight)
    return result


def _restart_steps(rows: Sequence[Row]) -> list[int]:
    first: dict[int, int] = {}
    for row in rows:
        restart = row.get("trainer/restarts")
        if row["event"] == "train" and isinstance(restart, int):
            first.setdefault(restart, row["step"])
    return [step for restart, step in sorted(first.items()) if restart > 0]
