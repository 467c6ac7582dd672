"""What benchmarks/data.py measured: figures, and what each of them should be."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    """What a figure should be."""

    bound: float
    is_least: bool

    def __str__(self) -> str:
        return f"{'>=' if self.is_least else '<='} {self.bound:,g}"

    def is_met(self, value: float) -> bool:
        """Whether a value is on the right side of the bound, or on it."""
        return value >= self.bound if self.is_least else value <= self.bound


def at_least(bound: float) -> Target:
    """A target for figures of which more is better."""
    return Target(bound, True)


def at_most(bound: float) -> Target:
    """A target for figures of which less is better."""
    return Target(bound, False)


@dataclass(frozen=True)
class Figure:
    """One measured value."""

    what: str
    value: float
    unit: str
    target: Target | None

    def __str__(self) -> str:
        verdict = "    " if self.target is None else "met " if self.target.is_met(self.value) else "MISS"
        value = f"{self.value:,.0f}" if abs(self.value) >= 1000 else f"{self.value:,.2f}"
        return f"{verdict} {self.what:<78} {value:>12} {self.unit:<10} {self.target or ''}"


class Results:
    """What was measured."""

    def __init__(self) -> None:
        self.figures: list[Figure] = []

    def add(self, what: str, value: float, unit: str, target: Target | None = None) -> None:
        """Record a figure and show it."""
        self.figures.append(Figure(what, value, unit, target))
        print(self.figures[-1], flush=True)
