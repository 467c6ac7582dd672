"""Pictures of runs, drawn from `metrics.jsonl` with matplotlib."""

import contextlib
import math
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dist_transformer.errors import UserError
from dist_transformer.tracking.console import human_count
from dist_transformer.tracking.curves import Curve, RunCurves, load_curves, smooth

# Okabe and Ito's palette: told apart by people of every colour vision, and in grey print by its lightness.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_SET_STYLES: tuple[Any, ...] = ((0, (4, 1.5)), (0, (1, 1.2)), (0, (4, 1.2, 1, 1.2)), (0, (8, 2)))
_GREY = "#555555"
_ROUND = (1, 2, 2.5, 5, 10)  # First digits of ticks.
_STYLE: dict[str, Any] = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.edgecolor": "#888888",
    "axes.grid": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "legend.frameon": False,
    "lines.solid_capstyle": "round",
}


def draw_run(run_dirs: Sequence[Path], out: Path) -> Path:
    """Draw one run, or several over each other, into the PNG file `out`; its path.

    Loss on top (training light and smoothed, evaluation with markers), below it learning rate, throughput and
    gradient norm as far as they were logged. Steps that were replayed after a restart appear once.
    """
    if not run_dirs:
        raise UserError("no run directory to draw: name at least one")
    runs = [load_curves(run_dir, name) for run_dir, name in zip(run_dirs, _names(run_dirs), strict=True)]
    import matplotlib as mpl

    with mpl.rc_context(_STYLE):
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
        _draw_training(axes, training, run_colour, "training" if alone else run.name)
        for name, curve in run.eval_losses.items():
            number = sets.index(name)
            # Alone, the sets differ by colour too; several runs need the colours for themselves.
            colour = _COLOURS[1 + number % (len(_COLOURS) - 1)] if alone else run_colour
            _draw_points(
                axes, curve, colour, _SET_STYLES[number % len(_SET_STYLES)], _set_label(name) if alone else ""
            )
    if not alone:
        for number, name in enumerate(sets):
            axes.plot(
                [], [], color=_GREY, linestyle=_SET_STYLES[number % len(_SET_STYLES)], label=_set_label(name)
            )
    for run_colour, run in zip(_cycle(len(runs)), runs, strict=True):
        _mark_nonfinite(axes, run, run_colour, "" if alone else f" in {run.name}")
    axes.set_ylabel("loss (nats per target token)")
    axes.set_xlabel("step")
    _limit(axes, runs)
    _step_axis(axes, n_ticks=10)
    if alone:
        has_tokens = _token_axis(axes, runs[0])
        axes.set_title(_facts(runs[0]), fontweight="normal", color=_GREY, pad=40 if has_tokens else 8)
        _mark_restarts(axes, runs[0])
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="upper right", ncols=1 if alone else 1 + len(runs) // 6)
    else:
        axes.text(0.5, 0.5, "no loss was logged", transform=axes.transAxes, ha="center", color=_GREY)


def _draw_points(axes: Any, curve: Curve, colour: str, line: Any, label: str) -> None:
    """A curve of few points that each count."""
    finite = curve.finite()
    axes.plot(
        finite.steps,
        finite.values,
        color=colour,
        linestyle=line,
        linewidth=1.6,
        marker="o",
        markersize=5,
        markeredgecolor="white",
        markeredgewidth=0.8,
        zorder=4,
        label=label or "_no legend",
    )


def _draw_training(axes: Any, curve: Curve | None, colour: str, label: str) -> None:
    """The measured points, light, and a smooth line through them; few points are shown as they are."""
    if curve is None:
        return
    finite = curve.finite()
    n_points = len(finite.steps)
    if n_points < 12:
        axes.plot(
            finite.steps,
            finite.values,
            color=colour,
            linewidth=1.6,
            marker=".",
            label=_plain(label),
            zorder=3,
        )
        return
    axes.plot(finite.steps, finite.values, color=colour, linewidth=0.8, alpha=0.3, zorder=2)
    axes.plot(finite.steps, smooth(finite.values), color=colour, linewidth=2.0, label=_plain(label), zorder=3)


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
            _draw_points(axes, curve, colour, "-", "")
        else:
            _draw_training(axes, curve, colour, run.name)
    axes.set_title(title)
    axes.set_ylabel(unit)
    axes.set_xlabel("step")
    _step_axis(axes, n_ticks=4)
    if key == "train/grad_norm":
        if highest > 30 * lowest_positive:
            _log_axis(axes)
    elif highest > 0:
        axes.set_ylim(0, 1.1 * highest)
        _short_ticks(axes, unit, highest)


def _short_ticks(axes: Any, unit: str, highest: float) -> None:
    """Ticks of few digits: 150k for large numbers, and a power of ten at the unit for small ones."""
    from matplotlib.ticker import FuncFormatter

    exponent = math.floor(math.log10(highest))
    if exponent < -1:
        scale = 10.0**exponent
        axes.set_ylabel(rf"{unit} ($\times 10^{{{exponent}}}$)")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / scale:.3g}"))
    elif exponent >= 3:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _round_count(value)))


def _log_axis(axes: Any) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(numticks=5))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _small_panels(runs: Sequence[RunCurves]) -> list[tuple[str, str, str]]:
    """Title, unit and key of the panels for which any run has points."""
    wanted = [
        ("Learning rate", "learning rate", "train/lr"),
        ("Throughput", "real tokens / s, all ranks", "perf/tokens_per_sec"),
        ("Gradient norm", "norm before clipping", "train/grad_norm"),
    ]
    bleu = sorted({key for run in runs for key in run.scalars if key.endswith("/bleu")})
    wanted += [("BLEU", _plain(key.removeprefix("eval/").removesuffix("/bleu")), key) for key in bleu[:1]]
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


def _mark_nonfinite(axes: Any, run: RunCurves, colour: str, where: str) -> None:
    """Crosses on the lower edge where the loss was no number."""
    steps = run.scalars.get("train/loss", Curve()).nonfinite_steps()
    if not steps:
        return
    axes.plot(
        steps,
        [0.015] * len(steps),
        transform=axes.get_xaxis_transform(),
        linestyle="none",
        marker="x",
        color=colour,
        markersize=7,
        markeredgewidth=2,
        label=_plain(f"loss not finite{where} ({len(steps)}×)"),
        zorder=5,
    )


def _mark_restarts(axes: Any, run: RunCurves) -> None:
    for number, step in enumerate(run.restart_steps):
        axes.axvline(step, color=_GREY, linewidth=1, linestyle=(0, (2, 3)), zorder=1)
        if number < 12:
            axes.text(
                step,
                0.985,
                " restart",
                transform=axes.get_xaxis_transform(),
                color=_GREY,
                fontsize=8,
                va="top",
            )


def _token_axis(axes: Any, run: RunCurves) -> bool:
    """Tokens seen along the upper edge, at round numbers; whether they are known."""
    from matplotlib.ticker import MaxNLocator

    known = run.tokens.finite()
    if len(known.steps) < 2 or known.values[-1] <= known.values[0]:
        return False
    low, high = known.values[0], known.values[-1]
    tokens = [tick for tick in MaxNLocator(9, steps=_ROUND).tick_values(low, high) if low <= tick <= high]
    upper = axes.secondary_xaxis("top")
    upper.set_xlabel("tokens seen", color=_GREY)
    upper.set_xticks([known.step_of(tick) for tick in tokens], [_round_count(tick) for tick in tokens])
    upper.tick_params(colors=_GREY, length=3)
    upper.spines["top"].set_visible(True)
    return True


def _round_count(number: float) -> str:
    """As `human_count`, for round numbers: 50k, not 50.0k."""
    text = human_count(number)
    unit = text.lstrip("-0123456789.")
    digits = text[: len(text) - len(unit)]
    return (digits.rstrip("0").rstrip(".") if "." in digits else digits) + unit


def _set_label(name: str) -> str:
    return _plain(f"evaluation: {name}" if name else "evaluation")


def _step_axis(axes: Any, n_ticks: int) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(n_ticks, integer=True, min_n_ticks=1, steps=_ROUND))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.margins(x=0.02)


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
            facts.append(_plain(f"{name or 'evaluation'} loss {values[-1]:.3f} (best {min(values):.3f})"))
    speed = run.scalars.get("perf/tokens_per_sec", Curve()).finite().values
    if speed:
        facts.append(f"{human_count(sorted(speed)[len(speed) // 2])} tokens/s")
    if run.n_restarts:
        facts.append(f"{run.n_restarts} restart{'s' if run.n_restarts > 1 else ''}")
    return "  ·  ".join(facts)


def _title(runs: Sequence[RunCurves]) -> str:
    return _plain(runs[0].name if len(runs) == 1 else f"{len(runs)} runs")


def _names(run_dirs: Sequence[Path]) -> list[str]:
    """The folders' names, with as many parents as it takes to tell them apart."""
    paths = [run_dir.resolve() for run_dir in run_dirs]
    names = [path.name for path in paths]
    for depth in range(2, 6):
        if len(set(names)) == len(set(paths)):
            break
        names = ["/".join(path.parts[-depth:]) for path in paths]
    return names


def _plain(text: str) -> str:
    """Text without matplotlib's own meaning of dollar signs and of a leading underscore."""
    return text.replace("$", r"\$").lstrip("_")


def _cycle(count: int) -> list[str]:
    return [_COLOURS[number % len(_COLOURS)] for number in range(count)]


def _save(figure: Any, out: Path) -> None:
    """Write the picture beside and rename it: whoever looks meanwhile sees the old or the new one whole."""
    beside: Path | None = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        fd, name = tempfile.mkstemp(prefix=f".{out.name}.", suffix=".png", dir=out.parent)
        beside = Path(name)
        with os.fdopen(fd, "wb") as file:
            os.fchmod(fd, 0o644)
            figure.savefig(file, format="png")
        beside.replace(out)
    except OSError as error:
        if beside is not None:
            with contextlib.suppress(OSError):
                beside.unlink()
        raise UserError(f"{out} cannot be written: {error.strerror or error}") from error
