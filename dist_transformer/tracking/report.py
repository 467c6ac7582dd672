"""Pictures of runs, drawn from `metrics.jsonl` with matplotlib."""

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dist_transformer.errors import UserError
from dist_transformer.tracking.chart import (
    COLOURS,
    GREY,
    SET_STYLES,
    STYLE,
    draw_points,
    draw_training,
    log_axis,
    mark_nonfinite,
    plain,
    short_ticks,
    step_axis,
    token_axis,
)
from dist_transformer.tracking.console import human_count
from dist_transformer.tracking.curves import Curve, RunCurves, load_curves, run_names, smooth
from dist_transformer.tracking.page import write_beside


def draw_run(run_dirs: Sequence[Path], out: Path) -> Path:
    """Draw one run, or several over each other, into the PNG file `out`; its path.

    Loss on top (training light and smoothed, evaluation with markers), below it learning rate, throughput and
    gradient norm as far as they were logged. Steps that were replayed after a restart appear once.
    """
    if not run_dirs:
        raise UserError("no run directory to draw: name at least one")
    runs = [load_curves(run_dir, name) for run_dir, name in zip(run_dirs, run_names(run_dirs), strict=True)]
    import matplotlib as mpl

    with mpl.rc_context(STYLE):
        figure = _draw(runs)
        _save(figure, out)
    return out


def _draw(runs: Sequence[RunCurves]) -> Any:
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    panels = _small_panels(runs)
    height = 8.2 if panels else 5.4
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.10)
    figure = Figure(figsize=(12, height), dpi=150, facecolor="white", layout=layout)
    figure.suptitle(_title(runs), x=0.012, ha="left", fontsize=15, fontweight="bold")
    if panels:
        grid = figure.add_gridspec(2, len(panels), height_ratios=(2.1, 1))
        main = figure.add_subplot(grid[0, :])
    else:
        main = figure.add_subplot()
    _loss_panel(main, runs)
    for column, (title, unit, key) in enumerate(panels):
        axes = figure.add_subplot(grid[1, column])
        _small_panel(axes, runs, title, unit, key)
    return figure


def _loss_panel(axes: Any, runs: Sequence[RunCurves]) -> None:
    alone = len(runs) == 1
    sets = sorted({name for run in runs for name in run.eval_losses})
    for run_colour, run in zip(_cycle(len(runs)), runs, strict=True):
        training = run.scalars.get("train/loss")
        draw_training(axes, training, run_colour, "training" if alone else run.name)
        for name, curve in run.eval_losses.items():
            number = sets.index(name)
            # Alone, the sets differ by colour too; several runs need the colours for themselves.
            colour = COLOURS[1 + number % (len(COLOURS) - 1)] if alone else run_colour
            draw_points(
                axes, curve, colour, SET_STYLES[number % len(SET_STYLES)], _set_label(name) if alone else ""
            )
    if not alone:
        for number, name in enumerate(sets):
            axes.plot(
                [], [], color=GREY, linestyle=SET_STYLES[number % len(SET_STYLES)], label=_set_label(name)
            )
    for run_colour, run in zip(_cycle(len(runs)), runs, strict=True):
        mark_nonfinite(axes, run, run_colour, "" if alone else f" in {run.name}")
    axes.set_ylabel("loss (nats per target token)")
    axes.set_xlabel("step")
    _limit(axes, runs)
    step_axis(axes, n_ticks=10)
    if alone:
        has_tokens = token_axis(axes, runs[0])
        axes.set_title(_facts(runs[0]), fontweight="normal", color=GREY, pad=40 if has_tokens else 8)
        _mark_restarts(axes, runs[0])
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="upper right", ncols=1 if alone else 1 + len(runs) // 6)
    else:
        axes.text(0.5, 0.5, "no loss was logged", transform=axes.transAxes, ha="center", color=GREY)


def _small_panel(axes: Any, runs: Sequence[RunCurves], title: str, unit: str, key: str) -> None:
    highest, lowest_positive = 0.0, math.inf
    for colour, run in zip(_cycle(len(runs)), runs, strict=True):
        curve = run.scalars.get(key, Curve())
        values = curve.finite().values
        highest = max([highest, *values])
        lowest_positive = min([lowest_positive, *(value for value in values if value > 0)])
        if key == "train/lr":
            axes.plot(curve.finite().steps, values, color=colour, linewidth=1.8)
        elif key.startswith("eval/"):
            draw_points(axes, curve, colour, "-", "")
        else:
            draw_training(axes, curve, colour, run.name)
    axes.set_title(title)
    axes.set_ylabel(unit)
    axes.set_xlabel("step")
    step_axis(axes, n_ticks=4)
    if key == "train/grad_norm":
        if highest > 30 * lowest_positive:
            log_axis(axes)
    elif highest > 0:
        axes.set_ylim(0, 1.1 * highest)
        short_ticks(axes, unit, highest)


def _small_panels(runs: Sequence[RunCurves]) -> list[tuple[str, str, str]]:
    """Title, unit and key of the panels for which any run has points."""
    wanted = [
        ("Learning rate", "learning rate", "train/lr"),
        ("Throughput", "real tokens / s, all ranks", "perf/tokens_per_sec"),
        ("Gradient norm", "norm before clipping", "train/grad_norm"),
    ]
    bleu = sorted({key for run in runs for key in run.scalars if key.endswith("/bleu")})
    wanted += [("BLEU", plain(key.removeprefix("eval/").removesuffix("/bleu")), key) for key in bleu[:1]]
    return [
        panel for panel in wanted if any(run.scalars.get(panel[2], Curve()).finite().steps for run in runs)
    ]


def _limit(axes: Any, runs: Sequence[RunCurves]) -> None:
    """Keep single spikes from squeezing the curve: the axis ends a little above 99.5 % of the points."""
    train = sorted(v for run in runs if (c := run.scalars.get("train/loss")) for v in c.finite().values)
    evals = [v for run in runs for curve in run.eval_losses.values() for v in curve.finite().values]
    if len(train) < 20:
        return
    high = max([train[int(0.995 * (len(train) - 1))], *evals])
    low = min([train[0], *evals])
    margin = 0.06 * (high - low) or 0.1
    if train[-1] > high + 3 * margin:
        axes.set_ylim(low - margin, high + margin)


def _mark_restarts(axes: Any, run: RunCurves) -> None:
    for number, step in enumerate(run.restart_steps):
        axes.axvline(step, color=GREY, linewidth=1, linestyle=(0, (2, 3)), zorder=1)
        if number < 12:
            axes.text(
                step,
                0.985,
                " restart",
                transform=axes.get_xaxis_transform(),
                color=GREY,
                fontsize=8,
                va="top",
            )


def _set_label(name: str) -> str:
    return plain(f"evaluation: {name}" if name else "evaluation")


def _facts(run: RunCurves) -> str:
    """The run in one line: how far, how much, how good."""
    facts = [f"{run.last_step:,} steps"]
    if run.tokens.finite().values:
        facts.append(f"{human_count(run.tokens.finite().values[-1])} tokens")
    loss = run.scalars.get("train/loss", Curve()).finite().values
    if loss:
        facts.append(f"training loss {smooth(loss)[-1] if len(loss) >= 12 else loss[-1]:.3f}")
    for name, curve in run.eval_losses.items():
        if values := curve.finite().values:
            facts.append(plain(f"{name or 'evaluation'} loss {values[-1]:.3f} (best {min(values):.3f})"))
    speed = run.scalars.get("perf/tokens_per_sec", Curve()).finite().values
    if speed:
        facts.append(f"{human_count(sorted(speed)[len(speed) // 2])} tokens/s")
    if run.n_restarts:
        facts.append(f"{run.n_restarts} restart{'s' if run.n_restarts > 1 else ''}")
    return "  ·  ".join(facts)


def _title(runs: Sequence[RunCurves]) -> str:
    return plain(runs[0].name if len(runs) == 1 else f"{len(runs)} runs")


def _cycle(count: int) -> list[str]:
    return [COLOURS[number % len(COLOURS)] for number in range(count)]


def _save(figure: Any, out: Path) -> None:
    content = io.BytesIO()
    figure.savefig(content, format="png")
    write_beside(out, content.getvalue())
