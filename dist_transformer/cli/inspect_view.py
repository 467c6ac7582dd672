"""An inspection drawn for people: tables, histograms, rows with spans in colour. Without colour it says the same."""

import re
from collections.abc import Iterator, Sequence
from typing import IO

from rich.console import Console, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from dist_transformer.data.inspect import CorpusFigures, Inspection, LengthFigures
from dist_transformer.data.sample_rows import Part, ShownRow

_SPAN_STYLES = (
    "red",
    "green",
    "yellow",
    "blue",
    "magenta",
    "cyan",
    "bright_red",
    "bright_green",
    "bright_blue",
)
"""Of spans 0, 1, ...; then again from the first."""
_BAR_WIDTH = 40
_FULL = 0.97
"""Share of a side from which on no other row lengths are suggested."""
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")
"""Shards are untrusted: nothing in them may steer the terminal."""
_COUNTS = {
    "n_truncated": "truncated to a row",
    "n_split": "split into several rows' pieces",
    "n_dropped": "dropped",
    "n_bad": "lost to damage",
}
_PREPARED = {"n_empty": "empty and left out", "n_split": "longer than a document may be and split"}


def show_inspection(inspection: Inspection, rows: Sequence[ShownRow], stream: IO[str]) -> None:
    """Print all of it; colours only where the stream is a terminal and NO_COLOR is not set."""
    console = Console(file=stream, highlight=False, markup=False, emoji=False)
    for corpus in inspection.corpora:
        for part in _corpus(corpus, inspection):
            console.print(part)
    if len(inspection.corpora) > 1:
        console.print(_mixture(inspection))
    console.print(_lanes(inspection))
    for row in rows:
        console.print()
        for part in _row(row, inspection):
            console.print(part)


def _corpus(corpus: CorpusFigures, inspection: Inspection) -> Iterator[RenderableType]:
    name = f"{corpus.name}: " if len(inspection.corpora) > 1 else ""
    yield _heading(name + corpus.location)
    stored = (
        "text, tokenised when it is read" if corpus.storage == "raw" else f"tokens ({corpus.token_dtype})"
    )
    yield _note(
        f"{corpus.kind}, stored as {stored}; vocabulary of {corpus.vocab_size:,}; objective {corpus.objective}"
    )
    yield _splits(corpus)
    for name, n in corpus.prepared.items():
        yield _note(f"in preparation: {n:,} {_PREPARED.get(name, name.removeprefix('n_'))}")
    yield _note(
        f"read: {corpus.n_windows_read:,} of {corpus.n_windows:,} windows, {corpus.n_samples_read:,} samples"
    )
    for name, n in corpus.counts.items():
        if n:
            yield _note(f"of them {n:,} {_COUNTS.get(name, name)}")
    for problem in corpus.problems:
        yield _note(problem)
    for lengths in corpus.lengths:
        yield _histogram(lengths)
    yield from _fill(corpus, inspection)


def _heading(text: str) -> Text:
    return Text(_shown(text), style="bold")


def _note(text: str) -> Padding:
    return Padding(_shown(text), (0, 0, 0, 2), expand=False)


def _splits(corpus: CorpusFigures) -> Padding:
    sides = ("source tokens", "target tokens") if corpus.kind == "pairs" else ("tokens",)
    table = Table(box=None, pad_edge=False)
    table.add_column("split")
    for name in ("shards", "samples", "per shard", *sides, "size"):
        table.add_column(name, justify="right")
    for split in corpus.splits:
        tokens = (split.n_source_tokens, split.n_target_tokens)[: len(sides)]
        fewest, most = split.n_samples_of_smallest_shard, split.n_samples_of_largest_shard
        table.add_row(
            split.split,
            f"{split.n_shards:,}",
            f"{split.n_samples:,}",
            f"{fewest:,}" if fewest == most else f"{fewest:,} to {most:,}",
            *(f"{n:,}" for n in tokens),
            _bytes(split.n_bytes),
        )
    return Padding(table, (0, 0, 0, 2), expand=False)


def _bytes(n: int) -> str:
    size, unit = float(n), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if size < 1024 or unit == "TiB":
            break
        size /= 1024
    return f"{size:,.0f} {unit}" if unit == "B" else f"{size:,.1f} {unit}"


def _histogram(lengths: LengthFigures) -> Padding:
    title = (
        f"tokens of a {lengths.side}: {lengths.shortest:,} to {lengths.longest:,}, mean {lengths.mean:,.1f}, "
        f"median {lengths.median:,}, 99 % up to {lengths.p99:,}"
    )
    bars = Table.grid(padding=(0, 1))
    bars.add_column(justify="right")
    bars.add_column()
    bars.add_column(justify="right")
    most = max(lengths.counts)
    last = len(lengths.edges) - 1
    for i, (edge, count) in enumerate(zip(lengths.edges, lengths.counts, strict=True)):
        upper = "and more" if i == last else f"to {lengths.edges[i + 1] - 1:,}"
        bars.add_row(
            f"{edge:,} {upper}", Text("█" * round(_BAR_WIDTH * count / most), style="cyan"), f"{count:,}"
        )
    whole = Table.grid()
    whole.add_row(title)
    whole.add_row(Padding(bars, (0, 0, 0, 2), expand=False))
    return Padding(whole, (0, 0, 0, 2), expand=False)


def _fill(corpus: CorpusFigures, inspection: Inspection) -> Iterator[Padding]:
    fill = corpus.fill
    if not fill.n_rows:
        yield _note("no row came of it")
        return
    rows = "buckets" if fill.layout == "bucketed" else f"{fill.layout} rows"
    yield _note(
        f"{rows} of {inspection.max_source_len} source and {inspection.max_target_len} target tokens, "
        f"{fill.n_pieces / fill.n_rows:,.1f} pairs each: source side {fill.source_share:.1%} full, target side "
        f"{fill.target_share:.1%}"
    )
    suggested = corpus.suggested_lengths
    if fill.layout == "packed" and suggested and min(fill.source_share, fill.target_share) < _FULL:
        yield _note(
            f"both sides would fill with data.max_source_len={suggested[0]} data.max_target_len={suggested[1]}"
        )
    yield _note(
        f"an epoch is about {corpus.rows_per_epoch:,.0f} rows; 1,000 steps of {inspection.global_batch_size:,} rows "
        f"are {corpus.epochs_per_1000_steps:,.2f} epochs"
    )


def _mixture(inspection: Inspection) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("mixture", style="bold")
    for name in ("share of rows", "rows in 1,000 steps", "rows an epoch", "epochs in 1,000 steps"):
        table.add_column(name, justify="right")
    for corpus in inspection.corpora:
        table.add_row(
            _shown(corpus.name),
            f"{corpus.share_of_rows:.2%}",
            f"{1000 * inspection.global_batch_size * corpus.share_of_rows:,.0f}",
            f"{corpus.rows_per_epoch:,.0f}",
            f"{corpus.epochs_per_1000_steps:,.2f}",
        )
    return table


def _lanes(inspection: Inspection) -> Text:
    served = ", ".join(map(str, inspection.serves))
    return Text(f"{inspection.n_lanes} lanes, which serve ranks x workers of {served}")


def _row(row: ShownRow, inspection: Inspection) -> Iterator[RenderableType]:
    source = f"{row.n_source_tokens} of {inspection.max_source_len}"
    target = f"{row.n_target_tokens} of {inspection.max_target_len}"
    corpus = f"{row.corpus}, " if len(inspection.corpora) > 1 else ""
    yield _heading(
        f"row {row.number}: {corpus}lane {row.lane}, epoch {row.epoch}, {row.shard}, window {row.window}; "
        f"source {source}, target {target} tokens"
    )
    table = Table.grid(padding=(0, 1))
    table.add_column(justify="right", style="dim")
    table.add_column(style="dim")
    table.add_column()
    for number, sample in enumerate(row.samples, start=1):
        table.add_row(str(number), "source", _parts(sample.source))
        table.add_row("", "target", _parts(sample.target))
    yield table


def _parts(parts: Sequence[Part]) -> Text:
    text = Text()
    for part in parts:
        style = {"mode": "bold reverse", "end": "dim"}.get(part.role, "")
        if part.span is not None:
            style = _SPAN_STYLES[part.span % len(_SPAN_STYLES)] + (" bold" if part.role == "sentinel" else "")
        text.append(_shown(part.text), style=style)
    return text


def _shown(text: str) -> str:
    """Text whose line ends and control characters are seen and not obeyed."""
    return _CONTROL.sub(lambda found: "⏎" if found[0] == "\n" else "\N{REPLACEMENT CHARACTER}", text)
