"""What a report shows of one run, as plain values: curves, the course of its processes, time accounts, samples."""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_transformer.tracking.accounts import ACCOUNTS, PRODUCTIVE
from dist_transformer.tracking.console import human_count, human_time
from dist_transformer.tracking.curves import Curve, RunCurves, load_curves, smooth
from dist_transformer.tracking.jsonl import Row
from dist_transformer.tracking.metrics import read_metrics

Plain = dict[str, Any]
_MAX_POINTS = 1200
_MAX_SAMPLES = 6


@dataclass
class RunPage:
    """One run of a report."""

    curves: RunCurves
    data: Plain
    """For the page's script: see `page_files/page.js`."""
    facts: dict[str, str]
    """What the run is judged by, by name, in order."""
    config: Plain
    """The configuration as a tree; empty where the file is missing."""
    samples: list[dict[str, str]]
    """Newest decoded samples: source, output, reference."""
    samples_step: int | None


def load_page(run_dir: Path, name: str) -> RunPage:
    """Read everything that is shown of a run.

    Raises:
        UserError: if there is no run, or nothing to draw yet.
    """
    curves = load_curves(run_dir, name)
    rows = read_metrics(run_dir)
    start = _first_start(rows)
    processes = _processes(rows, start)
    hours = max(0.0, max(row["time"] for row in rows) - start) / 3600
    train = [row for row in read_metrics(run_dir, last_wins=True) if row["event"] == "train"]
    samples_step, samples = _samples(run_dir)
    data: Plain = {
        "name": name,
        "series": {key: _thin(curve.finite()) for key, curve in curves.scalars.items()},
        "axis": {
            "step": [row["step"] for row in train],
            "tokens": [row.get("trainer/tokens_seen", 0) for row in train],
            "hours": [_rounded((row["time"] - start) / 3600) for row in train],
        },
        "restarts": [{"step": step, "text": f"restart at step {step:,}"} for step in curves.restart_steps],
        "hours": _rounded(hours),
        "processes": processes,
        "checkpoints": _events(rows, start, "checkpoint"),
        "alerts": _events(rows, start, "alert"),
        "accounts": _accounts(rows, processes, hours),
    }
    axis = data["axis"]
    keep = range(0, len(train), max(1, len(train) // _MAX_POINTS))
    places = sorted({*keep, *([len(train) - 1] if train else [])})
    data["axis"] = {key: [values[place] for place in places] for key, values in axis.items()}
    return RunPage(curves, data, _facts(curves, rows, hours), _config(run_dir), samples, samples_step)


def flatten(tree: Plain, prefix: str = "") -> dict[str, str]:
    """A configuration's fields by dotted name."""
    found: dict[str, str] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            found.update(flatten(value, f"{prefix}{key}."))
        else:
            found[f"{prefix}{key}"] = str(value)
    return found


def _facts(curves: RunCurves, rows: Sequence[Row], hours: float) -> dict[str, str]:
    facts = {"steps": f"{curves.last_step:,}"}
    if tokens := curves.tokens.finite().values:
        facts["tokens"] = human_count(tokens[-1])
    if loss := curves.scalars.get("train/loss", Curve()).finite().values:
        facts["training loss"] = f"{smooth(loss)[-1] if len(loss) >= 12 else loss[-1]:.3f}"
    for name, curve in curves.eval_losses.items():
        if values := curve.finite().values:
            facts[f"{name or 'evaluation'} loss"] = f"{values[-1]:.3f}"
            facts[f"best {name or 'evaluation'} loss"] = f"{min(values):.3f}"
    for key, curve in curves.scalars.items():
        if key.endswith("/bleu") and (values := curve.finite().values):
            facts[f"{key.removeprefix('eval/').replace('/', ' ')}"] = f"{values[-1]:.1f}"
    for key, label, unit in (
        ("perf/tokens_per_sec", "tokens/s (median)", ""),
        ("perf/mfu_pct", "MFU (median)", " %"),
        ("perf/padding_pct", "padding (median)", " %"),
    ):
        if values := sorted(curves.scalars.get(key, Curve()).finite().values):
            middle = values[len(values) // 2]
            facts[label] = f"{middle:.1f}{unit}" if unit else human_count(middle)
    if goodput := curves.scalars.get("perf/goodput_pct", Curve()).finite().values:
        facts["goodput"] = f"{goodput[-1]:.1f} %"
    facts["wall time"] = human_time(3600 * hours)
    facts["restarts"] = str(curves.n_restarts)
    n_alerts = sum(row["event"] == "alert" and row.get("alert/kind") != "restart" for row in rows)
    facts["alerts"] = str(n_alerts)
    return facts


def _first_start(rows: Sequence[Row]) -> float:
    return min(float(row["time"]) - float(row.get("time/wall_s") or 0.0) for row in rows)


def _processes(rows: Sequence[Row], start: float) -> list[Plain]:
    """When each process ran, in hours since the run began, and from when on what it did was lost."""
    groups: dict[int, list[Row]] = {}
    for row in rows:
        groups.setdefault(int(row.get("trainer/restarts") or 0), []).append(row)
    found: list[Plain] = []
    numbers = sorted(groups)
    for place, number in enumerate(numbers):
        own = groups[number]
        began = min(row["time"] - float(row.get("time/wall_s") or 0.0) for row in own)
        ended = max(row["time"] for row in own)
        steps = [row["step"] for row in own if row["event"] == "train"]
        # Everything behind the lowest step that a later process went on from has been trained again.
        resumed = min((_resumed_step(groups[later]) for later in numbers[place + 1 :]), default=math.inf)
        kept = max((row["time"] for row in own if row["step"] <= resumed), default=began)
        has_lost = any(step > resumed for step in steps)
        text = f"process {number + 1}: steps {min(steps):,} to {max(steps):,}" if steps else "no step"
        found.append(
            {
                "start": _rounded((began - start) / 3600),
                "end": _rounded((ended - start) / 3600),
                "lost": _rounded(((kept if has_lost else ended) - start) / 3600),
                "text": f"{text}, {human_time(ended - began)}",
                "number": number,
                "resumed": resumed,
            }
        )
    for process in found:
        if math.isinf(process["resumed"]):
            process["resumed"] = None
    return found


def _resumed_step(rows: Sequence[Row]) -> int:
    """The step after which a process went on: it says so first, else its first step tells."""
    for row in rows:
        if row["event"] == "alert" and row.get("alert/kind") == "restart":
            return int(row["step"])
    return min((row["step"] - 1 for row in rows if row["event"] == "train"), default=0)


def _events(rows: Sequence[Row], start: float, event: str) -> list[Plain]:
    found = []
    for row in rows:
        if row["event"] != event:
            continue
        kind, text = str(row.get("alert/kind", "")), str(row.get("alert/text", ""))
        if event == "checkpoint":
            seconds = row.get("checkpoint/save_s")
            text = (
                f"checkpoint, saved in {seconds:.1f} s" if isinstance(seconds, int | float) else "checkpoint"
            )
        found.append(
            {
                "hours": _rounded((row["time"] - start) / 3600),
                "step": row["step"],
                "kind": kind,
                "text": f"step {row['step']:,}: {text}",
            }
        )
    return found


def _accounts(rows: Sequence[Row], processes: Sequence[Plain], hours: float) -> list[Plain]:
    """Seconds by account over all processes; what was trained again is taken out of steps' accounts."""
    seconds = dict.fromkeys(ACCOUNTS, 0.0)
    lost = wall = 0.0
    for process in processes:
        own = [
            row for row in rows if row.get("trainer/restarts", 0) == process["number"] and _has_accounts(row)
        ]
        if not own:
            continue
        resumed = process["resumed"]
        kept = [row for row in own if resumed is None or row["step"] <= resumed]
        wall += own[-1]["time/wall_s"]
        for name in ACCOUNTS:
            spent = own[-1][f"time/{name}_s"]
            if name in PRODUCTIVE:
                useful = kept[-1][f"time/{name}_s"] if kept else 0.0
                lost += spent - useful
                spent = useful
            seconds[name] += spent
    if not wall:
        return []
    entries = {**seconds, "trained again": lost, "between processes": max(0.0, 3600 * hours - wall)}
    return [
        {"name": name, "seconds": _rounded(value), "text": human_time(value)}
        for name, value in entries.items()
        if value > 0
    ]


def _has_accounts(row: Row) -> bool:
    return row["event"] == "train" and all(f"time/{name}_s" in row for name in (*ACCOUNTS, "wall"))


def _thin(curve: Curve) -> list[list[float]]:
    """Few enough points for a page: of each stretch the lowest and the highest, so that no spike gets lost."""
    points = list(zip(curve.steps, (_rounded(value) for value in curve.values), strict=True))
    if len(points) > _MAX_POINTS:
        size = math.ceil(2 * len(points) / _MAX_POINTS)
        kept: list[tuple[int, float]] = []
        for first in range(0, len(points), size):
            stretch = points[first : first + size]
            ends = {stretch.index(choose(stretch, key=lambda point: point[1])) for choose in (min, max)}
            kept += [stretch[place] for place in sorted(ends)]
        points = [*kept, *([points[-1]] if kept[-1] != points[-1] else [])]
    return [[step, value] for step, value in points]


def _rounded(value: float) -> float:
    """Six digits: more cannot be seen."""
    return float(f"{value:.6g}")


def _config(run_dir: Path) -> Plain:
    import yaml

    try:
        tree = yaml.safe_load((run_dir / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError):
        return {}
    return tree if isinstance(tree, dict) else {}


def _samples(run_dir: Path) -> tuple[int | None, list[dict[str, str]]]:
    files = sorted((run_dir / "samples").glob("step-*.txt"))
    if not files:
        return None, []
    blocks = files[-1].read_text(encoding="utf-8", errors="replace").split("\n\n")
    found = [sample for block in blocks if (sample := _sample(block.splitlines()))]
    match = re.search(r"\d+", files[-1].stem)
    return int(match[0]) if match else None, found[:_MAX_SAMPLES]


def _sample(lines: Iterable[str]) -> dict[str, str]:
    parts = (line.partition(":") for line in lines)
    return {
        name: text.strip() for name, _, text in parts if name in ("source", "output", "reference") and text
    }
