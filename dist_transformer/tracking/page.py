"""`report.html`: one or several runs on one page that needs no network, for a screen, a phone, or paper."""

import contextlib
import json
import os
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from dist_transformer.errors import UserError
from dist_transformer.tracking.curves import run_names
from dist_transformer.tracking.page_data import RunPage, flatten, load_page

Panel = dict[str, Any]
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"


def write_report(run_dirs: Sequence[Path], out: Path) -> Path:
    """Write the page of these runs to `out`; its path.

    Raises:
        UserError: if a run has nothing to show, or the file cannot be written.
    """
    if not run_dirs:
        raise UserError("no run directory to report on: name at least one")
    names = run_names(run_dirs)
    runs = [load_page(run_dir, name) for run_dir, name in zip(run_dirs, names, strict=True)]
    write_beside(out, _page(runs).encode())
    return out


def write_beside(out: Path, content: bytes) -> None:
    """Write beside and rename: whoever looks meanwhile sees the old file or the new one whole.

    Raises:
        UserError: if the file cannot be written.
    """
    beside: Path | None = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        fd, name = tempfile.mkstemp(prefix=f".{out.name}.", dir=out.parent)
        beside = Path(name)
        with os.fdopen(fd, "wb") as file:
            os.fchmod(fd, 0o644)
            file.write(content)
        beside.replace(out)
    except OSError as error:
        if beside is not None:
            with contextlib.suppress(OSError):
                beside.unlink()
        raise UserError(f"{out} cannot be written: {error.strerror or error}") from error


def _page(runs: Sequence[RunPage]) -> str:
    title = runs[0].curves.name if len(runs) == 1 else f"{len(runs)} runs"
    panels = _panels(runs)
    data = {"runs": [run.data for run in runs], "panels": panels}
    # "<" would end the script element early, wherever a sample or a name holds "</script".
    text = json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    folder = files("dist_transformer.tracking") / "page_files"
    style, script = ((folder / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    written = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    body = [
        f'<h1>{escape(title)}</h1><p class="soft">written {written}</p>',
        _tiles(runs[0]) if len(runs) == 1 else _comparison(runs),
        _axis_choice(),
        *(_section(panels, group) for group in dict.fromkeys(panel["group"] for panel in panels)),
        _course(runs),
        *(_alerts(run) for run in runs),
        *(_samples(run, len(runs) == 1) for run in runs),
        _configuration(runs),
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,"><title>{escape(title)}</title><style>{style}</style></head>'
        f"<body>{''.join(body)}"
        f'<script type="application/json" id="data">{text}</script><script>{script}</script></body></html>\n'
    )


def _panels(runs: Sequence[RunPage]) -> list[Panel]:
    """The charts for which any run has points."""
    keys = {key for run in runs for key in run.data["series"]}
    evals = sorted(key for key in keys if key.startswith("eval/") and key.endswith("/loss"))
    scores = sorted(key for key in keys if key.startswith("eval/") and not key.endswith("/loss"))
    loss = [("train/loss", "training"), *((key, key[len("eval/") : -len("/loss")]) for key in evals)]
    panels = [
        _panel("Learning", "Loss", loss, unit="nats per target token", big=True, clip=0.99),
        _panel("Learning", "Learning rate", [("train/lr", "learning rate")], zero=True, exact=True),
        _panel("Learning", "Gradient norm", [("train/grad_norm", "before clipping")], log=True, clip=0.99),
        _panel("Learning", "Token accuracy", [("train/accuracy", "training")]),
        *(_panel("Learning", key.removeprefix("eval/"), [(key, key)]) for key in scores),
        _panel("Speed", "Throughput", [
            ("perf/tokens_per_sec", "both sides"), ("perf/source_tokens_per_sec", "source"),
            ("perf/target_tokens_per_sec", "target"),
        ], unit="real tokens / s, all ranks", zero=True),
        _panel("Speed", "Use of the devices", [("perf/mfu_pct", "MFU"), ("perf/hfu_pct", "HFU")], unit="%", zero=True),
        _panel("Speed", "Time of a step", [
            ("perf/step_time_s", "step"), ("perf/work_time_max_rank_s", "slowest rank's own work"),
            ("perf/work_time_mean_rank_s", "mean rank's own work"),
        ], unit="s", zero=True, clip=0.95),
        _panel("Speed", "Waiting in steps", [
            ("perf/communication_pct", "for other ranks"), ("perf/data_time_pct", "for data"),
        ], unit="% of step time", zero=True),
        _panel("Speed", "Padding", [
            ("perf/padding_pct", "both sides"), ("perf/source_padding_pct", "source"),
            ("perf/target_padding_pct", "target"),
        ], unit="% of positions", zero=True),
        _panel("Speed", "Goodput", [("perf/goodput_pct", "goodput")], unit="% of wall time", zero=True, exact=True),
        _panel("Resources", "Memory", [("memory/max_allocated_gib", "most used")], unit="GiB", zero=True, exact=True),
        _panel("Resources", "Free disk", [("health/disk_free_gib", "free")], unit="GiB", zero=True, exact=True),
        _panel("Resources", "Saving a checkpoint", [
            ("checkpoint/save_s", "in all"), ("checkpoint/blocked_s", "training waited"),
        ], unit="s", zero=True),
    ]  # fmt: skip
    return [panel for panel in panels if any(line["key"] in keys for line in panel["lines"])]


def _panel(group: str, title: str, lines: Sequence[tuple[str, str]], **options: Any) -> Panel:
    """A chart for `page.js`; evaluations and checkpoints are few points that each count.

    Options: `clip`, the share of points that must be seen whole where single spikes rise far above them.
    """
    return {
        "group": group,
        "title": title,
        "lines": [
            {"key": key, "name": name, "dots": key.startswith(("eval/", "checkpoint/"))}
            for key, name in lines
        ],
        **options,
    }


def _section(panels: Sequence[Panel], group: str) -> str:
    charts = "".join(
        f'<figure class="chart{" big" if panel.get("big") else ""}" style="margin:0" data-panel="{number}"></figure>'
        for number, panel in enumerate(panels)
        if panel["group"] == group
    )
    return f'<h2>{escape(group)}</h2><div class="charts">{charts}</div>'


def _tiles(run: RunPage) -> str:
    tiles = "".join(
        f'<div class="tile"><b>{escape(value)}</b><span>{escape(name)}</span></div>'
        for name, value in run.facts.items()
    )
    return f'<div class="tiles">{tiles}</div>'


def _comparison(runs: Sequence[RunPage]) -> str:
    names = list(dict.fromkeys(name for run in runs for name in run.facts))
    head = "".join(
        f'<th><span class="key" style="background:var(--c{number % 7})"></span>{escape(run.curves.name)}</th>'
        for number, run in enumerate(runs)
    )
    rows = "".join(_row(name, [run.facts.get(name) for run in runs]) for name in names)
    return f'<div class="wide"><table><tr><th></th>{head}</tr>{rows}</table></div>'


def _row(name: str, values: Sequence[str | None]) -> str:
    cells = "".join(f"<td>{escape('–' if value is None else value)}</td>" for value in values)
    return f"<tr><th>{escape(name)}</th>{cells}</tr>"


def _axis_choice() -> str:
    choices = "".join(
        f'<label><input type="radio" name="axis" value="{value}"{checked}> {label}</label>'
        for value, label, checked in (
            ("step", "steps", " checked"),
            ("tokens", "tokens seen", ""),
            ("hours", "hours of wall time", ""),
        )
    )
    return f"<fieldset><legend>over</legend>{choices}</fieldset>"


def _course(runs: Sequence[RunPage]) -> str:
    """Timeline and time accounts of each run."""
    parts = ["<h2>Course</h2>"]
    for number, run in enumerate(runs):
        name = f"<h3>{escape(run.curves.name)}</h3>" if len(runs) > 1 else ""
        parts.append(
            f'<figure class="chart" style="margin:0 0 .5rem">{name}<p class="soft">blue: a process ran · red part: '
            "trained again after a restart · green: checkpoint · above: alerts and restarts</p>"
            f'<div data-timeline="{number}"></div></figure>'
        )
        if run.data["accounts"]:
            parts.append(
                f'<figure class="chart" style="margin:0 0 .8rem"><h3>Where the wall time went</h3>'
                f'<div data-accounts="{number}"></div></figure>'
            )
    return "".join(parts)


def _alerts(run: RunPage) -> str:
    alerts = run.data["alerts"]
    if not alerts:
        return ""
    shown = alerts[-50:]
    items = "".join(
        f'<tr><td class="n">{alert["hours"]:.2f} h</td>'
        f'<td class="{"soft" if alert["kind"] == "restart" else "bad"}">{escape(alert["kind"] or "alert")}</td>'
        f"<td>{escape(alert['text'])}</td></tr>"
        for alert in shown
    )
    left = f'<p class="soft">{len(alerts) - 50:,} older ones are left out</p>' if len(alerts) > 50 else ""
    title = f"<h2>Alerts and restarts: {escape(run.curves.name)}</h2>"
    return f'{title}{left}<div class="wide"><table>{items}</table></div>'


def _samples(run: RunPage, alone: bool) -> str:
    if not run.samples:
        return ""
    name = "" if alone else f" of {escape(run.curves.name)}"
    step = "" if run.samples_step is None else f" at step {run.samples_step:,}"
    items = "".join(
        '<dl class="sample">'
        + "".join(f"<dt>{escape(key)}</dt><dd>{escape(text)}</dd>" for key, text in sample.items())
        + "</dl>"
        for sample in run.samples
    )
    return f"<h2>Samples{name}{step}</h2>{items}"


def _configuration(runs: Sequence[RunPage]) -> str:
    import yaml

    parts = ["<h2>Configuration</h2>"]
    flat = [flatten(run.config) for run in runs]
    if len(runs) > 1:
        keys = sorted({key for fields in flat for key in fields})
        unlike = [key for key in keys if len({fields.get(key) for fields in flat}) > 1]
        head = "".join(f"<th>{escape(run.curves.name)}</th>" for run in runs)
        rows = "".join(_row(key, [fields.get(key) for fields in flat]) for key in unlike)
        parts.append(
            f'<p>What differs:</p><div class="wide"><table><tr><th></th>{head}</tr>{rows}</table></div>'
        )
    for run in runs:
        if not run.config:
            parts.append(f'<p class="soft">{escape(run.curves.name)}: config.yaml is missing</p>')
            continue
        text = yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True)
        parts.append(
            f"<details><summary>{escape(run.curves.name)}</summary><pre>{escape(text)}</pre></details>"
        )
    return "".join(parts)
