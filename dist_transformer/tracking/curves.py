"""The rows of `metrics.jsonl` as curves over steps."""

import bisect
import itertools
import math
from collections.abc import Iterator, Sequence
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

    def step_of(self, value: float) -> float:
        """Where a rising curve of at least two points reaches a value, interpolated."""
        right = min(max(bisect.bisect_left(self.values, value), 1), len(self.values) - 1)
        (x0, x1), (y0, y1) = self.steps[right - 1 : right + 1], self.values[right - 1 : right + 1]
        return x0 if y1 == y0 else x0 + (x1 - x0) * (value - y0) / (y1 - y0)


@dataclass
class RunCurves:
    """Everything that is drawn of one run."""

    name: str
    scalars: dict[str, Curve]
    """By metric name; training metrics from training rows, `eval/...` and `checkpoint/...` from theirs."""
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
    wanted = {"train": "", "eval": "eval/", "checkpoint": "checkpoint/"}
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
    if not any(key.startswith(("train/", "perf/", "eval/")) for key in scalars):
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


def run_names(run_dirs: Sequence[Path]) -> list[str]:
    """The folders' names, with as many parents as it takes to tell them apart."""
    paths = [run_dir.resolve() for run_dir in run_dirs]
    names = [path.name for path in paths]
    for depth in range(2, 6):
        if len(set(names)) == len(set(paths)):
            break
        names = ["/".join(path.parts[-depth:]) for path in paths]
    return names


def smooth(values: Sequence[float], share: float = 0.02) -> list[float]:
    """The curve behind the noise: a running median against spikes, then a running mean.

    Both look equally far to either side, so that the curve does not lag. At the start, where losses fall
    steeply, they look less far; at the end they look further back than ahead, so that the last value is no
    single point.
    """
    reach = max(2, round(share * len(values) / 2))
    calm = [_median(values[start:end]) for start, end in _windows(len(values), min(reach, 25))]
    sums = list(itertools.accumulate(calm, initial=0.0))
    return [(sums[end] - sums[start]) / (end - start) for start, end in _windows(len(values), reach)]


def _windows(length: int, reach: int) -> Iterator[tuple[int, int]]:
    for place in range(length):
        ahead = min(reach, place, length - 1 - place)
        back = min(reach, place, max(ahead, reach // 2))
        yield place - back, place + ahead + 1


def _median(window: Sequence[float]) -> float:
    return sorted(window)[len(window) // 2]


def _restart_steps(rows: Sequence[Row]) -> list[int]:
    first: dict[int, int] = {}
    for row in rows:
        restart = row.get("trainer/restarts")
        if row["event"] == "train" and isinstance(restart, int):
            first.setdefault(restart, row["step"])
    return [step for restart, step in sorted(first.items()) if restart > 0]
