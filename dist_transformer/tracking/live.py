"""The live progress line of a terminal, drawn with rich."""

from collections.abc import Mapping
from typing import IO

from rich.cells import cell_len
from rich.console import Console as RichConsole
from rich.console import ConsoleOptions, RenderResult
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

_MIN_BAR, _MAX_BAR = 8, 40
_STYLES = {"loss": "bold", "speed": "cyan", "eta": "green"}
_FIRST_TO_GO = ("gnorm", "lr", "speed", "eta", "loss")


class LiveLine:
    """A bar and the figures of the last step, always within one line of the terminal as it is now."""

    def __init__(self, stream: IO[str], total_steps: int, start_step: int) -> None:
        self._console = RichConsole(file=stream, force_terminal=True, highlight=False, soft_wrap=False)
        self._total = total_steps
        self._step = start_step
        self._fields: Mapping[str, str] = {}
        # The figures change when a step is reported; four looks a second follow a resized window.
        self._live = Live(
            self, console=self._console, refresh_per_second=4, redirect_stdout=True, redirect_stderr=True
        )
        self._live.start()

    def update(self, step: int, fields: Mapping[str, str]) -> None:
        """Show another step."""
        self._step, self._fields = step, dict(fields)

    def print(self, text: str) -> None:
        """Print a line above the bar."""
        self._console.print(escape(text), markup=True, soft_wrap=True)

    def close(self) -> None:
        """Draw the last state and give the terminal back."""
        self._live.stop()

    def __rich_console__(self, console: RichConsole, options: ConsoleOptions) -> RenderResult:
        """Draw for the width that the terminal has at this moment: the least important figures go first."""
        width = options.max_width - 1  # The last column stays free: some terminals wrap there.
        count = f"step {self._step:,}/{self._total:,}"
        fields = dict(self._fields)
        for name in (None, *_FIRST_TO_GO):
            fields.pop(name or "", None)
            used = cell_len(count) + sum(2 + cell_len(text) for text in fields.values())
            if used + 2 + _MIN_BAR <= width:
                break
        line = Table.grid(padding=0)
        cells: list[ProgressBar | Text] = []
        bar_width = min(_MAX_BAR, width - used - 2)
        if bar_width >= _MIN_BAR:
            cells += [
                ProgressBar(total=max(1, self._total), completed=self._step, width=bar_width),
                Text("  "),
            ]
        text = Text(count, no_wrap=True, overflow="crop", end="")
        for name, figure in fields.items():
            text.append("  ")
            text.append(figure, style=_STYLES.get(name, ""))
        text.truncate(max(1, width - (bar_width + 2 if cells else 0)))
        cells.append(text)
        line.add_row(*cells)
        yield line
