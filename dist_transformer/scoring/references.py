"""Several references of one source: from parallel files, or from lines that repeat the source."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Grouped:
    """Sources that are decoded once each, and everything that would be right for them."""

    sources: list[str]
    references: list[list[str]]
    """For each source, at least one."""


def group_by_source(sources: Sequence[str], references: Sequence[Sequence[str]]) -> Grouped:
    """Make one of consecutive equal sources, with the references of all of them.

    Sets with several right answers are often kept so: the E2E challenge's (Dusek et al. 2020, section 4.1: one output
    for each distinct meaning representation), pronouncing dictionaries. A source that comes again further down is
    another one.
    """
    grouped = Grouped([], [])
    for source, found in zip(sources, references, strict=True):
        if grouped.sources and grouped.sources[-1] == source:
            grouped.references[-1].extend(found)
        else:
            grouped.sources.append(source)
            grouped.references.append(list(found))
    return grouped
