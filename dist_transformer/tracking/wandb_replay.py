"""What a dashboard has of a run's earlier processes, and how the curves stay one line when steps are trained again.

A killed process leaves rows of steps behind its last checkpoint: they are trained again, and what a server has cannot
be taken back. And it may have died before its last rows had reached the dashboard, some of them of steps that do
count. W&B's own step is the row's number in `metrics.jsonl`, so that the file tells which rows are where.
"""

from dataclasses import dataclass, field
from pathlib import Path

from dist_transformer.tracking.jsonl import FILE_NAME, Row, decode
from dist_transformer.tracking.metrics import newest_rows
from dist_transformer.tracking.wandb_log import cut_after, is_uploaded, last_step, wandb_files

_PLOTTED = ("train", "eval")


@dataclass
class Replay:
    """The rows of earlier processes, as they were when this one started.

    Args:
        run_dir: where `metrics.jsonl` and `wandb/` are.
        resumed_step: the step after which this process goes on; 0: it starts from the beginning.
    """

    run_dir: Path
    resumed_step: int
    highest: dict[str, int] = field(default_factory=dict)
    """By event, the highest step that the dashboard has and cannot lose: rows up to it are not sent again."""
    last_x: int = 0
    """The highest training step on the dashboard."""

    def __post_init__(self) -> None:
        try:
            self._n_bytes = (self.run_dir / FILE_NAME).stat().st_size
        except OSError:
            self._n_bytes = 0
        # Without a checkpoint not even an evaluation before the first step counts any more.
        self._last_valid = self.resumed_step or -1

    def missing_offline(self) -> list[Row]:
        """Take lost rows out of logs that no server has seen; the rows that count and are in no log."""
        n_on_dashboard, n_uploaded = 0, 0
        for path in wandb_files(self.run_dir):
            found = last_step(path)
            n_rows = 0 if found is None else found + 1
            n_on_dashboard = max(n_on_dashboard, n_rows)
            if is_uploaded(path):
                n_uploaded = max(n_uploaded, n_rows)
            else:
                cut_after(path, self._last_valid)
        self._keep_in_mind(n_uploaded)
        return self._missing(n_on_dashboard)

    def missing_online(self, n_on_server: int) -> list[Row]:
        """The rows that count and that the server, which has rows below `n_on_server`, has not got."""
        self._keep_in_mind(n_on_server)
        return self._missing(n_on_server)

    def is_known(self, row: Row) -> bool:
        """Whether the dashboard has a row for this step already, from before a crash."""
        return row["event"] in _PLOTTED and row["step"] <= self.highest.get(row["event"], -1)

    def place(self, step: int) -> int:
        """Where a row is drawn: never left of what was drawn before."""
        self.last_x = max(self.last_x, step)
        return self.last_x

    def _keep_in_mind(self, n_rows: int) -> None:
        for row in self._rows_before():
            if row["row"] < n_rows:
                self.highest[row["event"]] = max(self.highest.get(row["event"], -1), row["step"])
                self.last_x = max(self.last_x, row["step"])

    def _missing(self, n_rows: int) -> list[Row]:
        missing = [
            row
            for row in self._rows_before()
            if row["row"] >= n_rows and row["step"] <= self._last_valid and not self.is_known(row)
        ]
        # Some of them may have been trained again already.
        plotted = newest_rows([row for row in missing if row["event"] in _PLOTTED])
        others = [row for row in missing if row["event"] not in _PLOTTED]
        return sorted(plotted + others, key=lambda row: int(row["row"]))

    def _rows_before(self) -> list[Row]:
        """Rows of the processes before this one."""
        if not self._n_bytes:
            return []
        with (self.run_dir / FILE_NAME).open("rb") as file:
            lines = file.read(self._n_bytes).splitlines()
        return [
            row for line in lines if (row := decode(line)) is not None and isinstance(row.get("row"), int)
        ]
