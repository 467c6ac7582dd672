"""The pieces that pictures of runs are put together from: lines, markers, axes."""

import math
from typing import Any

from dist_transformer.tracking.console import human_count
from dist_transformer.tracking.curves import Curve, RunCurves, smooth

# Okabe and Ito's palette: told apart by people of every colour vision, and in grey print by its lightness.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
SET_STYLES: tuple[Any, ...] = ((0, (4, 1.5)), (0, (1, 1.2)), (0, (4, 1.2, 1, 1.2)), (0, (8, 2)))
GREY = "#555555"
_ROUND = (1, 2, 2.5, 5, 10)  # First digits of ticks.
STYLE: dict[str, Any] = {
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


def draw_training(axes: Any, curve: Curve | None, colour: str, label: str) -> None:
    """The measured points, light, and a smooth line through them; few points are shown as they are."""
    if curve is None:
        return
    finite = curve.finite()
    n_points = len(finite.steps)
    if n_points < 12:
        axes.plot(
            finite.steps, finite.values, ".-", color=colour, linewidth=1.6, label=plain(label), zorder=3
        )
        return
    axes.plot(finite.steps, finite.values, color=colour, linewidth=0.8, alpha=0.3, zorder=2)
    axes.plot(finite.steps, smooth(finite.values), color=colour, linewidth=2.0, label=plain(label), zorder=3)


def draw_points(axes: Any, curve: Curve, colour: str, line: Any, label: str) -> None:
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


def mark_nonfinite(axes: Any, run: RunCurves, colour: str, where: str) -> None:
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
        label=plain(f"loss not finite{where} ({len(steps)}×)"),
        zorder=5,
    )


def token_axis(axes: Any, run: RunCurves) -> bool:
    """Tokens seen along the upper edge, at round numbers; whether they are known."""
    from matplotlib.ticker import MaxNLocator

    known = run.tokens.finite()
    if len(known.steps) < 2 or known.values[-1] <= known.values[0]:
        return False
    low, high = known.values[0], known.values[-1]
    tokens = [tick for tick in MaxNLocator(9, steps=_ROUND).tick_values(low, high) if low <= tick <= high]
    upper = axes.secondary_xaxis("top")
    upper.set_xlabel("tokens seen", color=GREY)
    upper.set_xticks([known.step_of(tick) for tick in tokens], [_round_count(tick) for tick in tokens])
    upper.tick_params(colors=GREY, length=3)
    upper.spines["top"].set_visible(True)
    return True


def step_axis(axes: Any, n_ticks: int) -> None:
    """Whole steps, at round numbers."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(n_ticks, integer=True, min_n_ticks=1, steps=_ROUND))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.margins(x=0.02)


def short_ticks(axes: Any, unit: str, highest: float) -> None:
    """Ticks of few digits: 150k for large numbers, and a power of ten at the unit for small ones."""
    from matplotlib.ticker import FuncFormatter

    exponent = math.floor(math.log10(highest))
    if exponent < -1:
        scale = 10.0**exponent
        axes.set_ylabel(rf"{unit} ($\times 10^{{{exponent}}}$)")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / scale:.3g}"))
    elif exponent >= 3:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _round_count(value)))


def log_axis(axes: Any) -> None:
    """A logarithmic axis with few plain labels."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(numticks=5))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _round_count(number: float) -> str:
    """As `human_count`, for round numbers: 50k, not 50.0k."""
    text = human_count(number)
    unit = text.lstrip("-0123456789.")
    digits = text[: len(text) - len(unit)]
    return (digits.rstrip("0").rstrip(".") if "." in digits else digits) + unit


def plain(text: str) -> str:
    """Text without matplotlib's own meaning of dollar signs and of a leading underscore."""
    return text.replace("$", r"\$").lstrip("_")
