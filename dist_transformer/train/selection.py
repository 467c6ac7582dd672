"""What an evaluation decides: which checkpoint is the best so far, and whether the run is done before its last step."""

import math
from typing import Any

from dist_transformer.checkpoints.folder import TrainerState
from dist_transformer.config import Config
from dist_transformer.errors import ConfigError
from dist_transformer.scoring import lower_is_better
from dist_transformer.train.evaluate import measured


class Selection:
    """Follows the figures of evaluations, in the state that checkpoints keep; the same on every rank."""

    def __init__(self, config: Config, state: TrainerState) -> None:
        self.state, self.best_metric, self.early = (
            state,
            config.checkpoint.best_metric,
            config.train.early_stopping,
        )
        self._is_lower_best = _is_lower(self.best_metric, config.checkpoint.best_mode)
        self._is_lower_early = _is_lower(self.early.metric, self.early.mode)
        # Where another figure is followed than before, all begins anew.
        state.best = _of(self.best_metric, state.best)
        state.early_stopping = _of(self.early.metric, state.early_stopping)
        self._earlier_bests: list[dict[str, Any]] = []

    def record(self, step: int, figures: dict[str, float]) -> bool:
        """Take note of an evaluation after update number `step`; whether its weights are the best so far."""
        self._record_early(figures)
        value = None if self.best_metric is None else figures.get(self.best_metric)
        if value is None or not _is_better(value, self.state.best, 0.0, self._is_lower_best):
            return False
        if self.state.best is not None:
            self._earlier_bests.append(self.state.best)
        self.state.best = {"metric": self.best_metric, "value": value, "step": step}
        return True

    def forget(self, step: int) -> None:
        """The checkpoint of a step could not be saved: the best is the one before."""
        self._earlier_bests = [best for best in self._earlier_bests if best["step"] != step]
        if self.state.best is not None and self.state.best["step"] == step:
            self.state.best = self._earlier_bests.pop() if self._earlier_bests else None

    @property
    def why_done(self) -> str | None:
        """Why the run is done before its last step, in one sentence; None: it is not."""
        found = self.state.early_stopping
        if found is None or found["n_without"] < self.early.patience:
            return None
        n_evaluations = found["n_without"]
        return f"{self.early.metric} was not better than {found['value']:.4g} in {n_evaluations} evaluations in a row"

    def _record_early(self, figures: dict[str, float]) -> None:
        metric, before = self.early.metric, self.state.early_stopping
        if metric is None or metric not in figures:
            return
        value = figures[metric]
        if _is_better(value, before, self.early.min_delta, self._is_lower_early):
            self.state.early_stopping = {"metric": metric, "value": value, "n_without": 0}
        else:
            before = before or {"metric": metric, "value": value, "n_without": 0}
            self.state.early_stopping = {**before, "n_without": before["n_without"] + 1}


def check_selection(config: Config) -> None:
    """Refuse figures that no evaluation of this run gives.

    Raises:
        ConfigError: one sentence that names those that there are.
    """
    there = measured(config)
    fields = {
        "checkpoint.best_metric": config.checkpoint.best_metric,
        "train.early_stopping.metric": config.train.early_stopping.metric,
    }
    for field, metric in fields.items():
        if metric is not None and metric not in there:
            known = f"there are {', '.join(there)}" if there else "it has no held-out set (data.eval)"
            raise ConfigError(f"{field}={metric} is no figure of this run's evaluations: {known}")


def _is_lower(metric: str | None, mode: str | None) -> bool:
    return mode == "min" if mode is not None else metric is not None and lower_is_better(metric)


def _of(metric: str | None, found: dict[str, Any] | None) -> dict[str, Any] | None:
    return found if found is not None and found["metric"] == metric else None


def _is_better(value: float, before: dict[str, Any] | None, by: float, is_lower: bool) -> bool:
    if not math.isfinite(value):
        return False
    if before is None or not math.isfinite(best := float(before["value"])):
        return True
    return value < best - by if is_lower else value > best + by
