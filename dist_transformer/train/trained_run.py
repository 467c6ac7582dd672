"""A run's weights as a model on one process, whatever layout wrote them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from dist_transformer.checkpoints.average import averaged_weights, newest_of
from dist_transformer.checkpoints.folder import check_files, find_checkpoint_in
from dist_transformer.checkpoints.reader import CheckpointReader, load_weights
from dist_transformer.config import Config, Weights, load_config
from dist_transformer.data.tokenizer import TextTokenizer
from dist_transformer.errors import CheckpointError
from dist_transformer.generate.ensemble import Ensemble, Scorer
from dist_transformer.model import EncoderDecoder, build_model


@dataclass(frozen=True)
class Choice:
    """Which of a run's weights are meant."""

    checkpoint: str | None = None
    """`latest`, `best`, a step's number or a folder's name; None: the latest."""
    weights: Weights | None = None
    """The trained ones or their moving average; None: what the run evaluates with, where the checkpoint has it."""
    average: int | None = None
    """The mean over so many of the newest checkpoints."""
    ensemble: tuple[Path, ...] = ()
    """Further runs, of which the same is meant, that decode together with it."""


class TrainedRun:
    """A run's newest checkpoint (or a chosen one) as a model, with its tokenizer and configuration.

    Args:
        path: a run directory, or a checkpoint: one of a run, or one that carries configuration and tokenizer itself.

    Raises:
        CheckpointError: if there is no run, no such checkpoint, or it cannot be read.
    """

    def __init__(self, path: Path, choice: Choice | None = None) -> None:
        choice = choice or Choice()
        if choice.average is not None and choice.checkpoint is not None:
            raise CheckpointError("--average takes the newest checkpoints: leave out --checkpoint")
        if not any((path / name).exists() for name in ("trainer.json", "config.yaml")):
            raise CheckpointError(f"{path}: no run there: config.yaml is missing")
        self.checkpoint = find_checkpoint_in(path, choice.checkpoint)
        """The folder that was read; the newest of those that were averaged."""
        self.weights: Weights = "current"
        """The trained ones or their moving average."""
        self.averaged: list[str] = []
        """Names of the checkpoints whose mean it is; none: it is one checkpoint's."""
        if choice.average is not None and self.checkpoint == path:
            raise CheckpointError(f"{path} is a checkpoint itself: --average needs its run")
        home = (
            self.checkpoint if (self.checkpoint / "config.yaml").exists() else self.checkpoint.parent.parent
        )
        if not (home / "config.yaml").exists():
            raise CheckpointError(f"{home}: no run there: config.yaml is missing")
        self.config: Config = load_config(home / "config.yaml")
        self.tokenizer = TextTokenizer.load(home / "tokenizer.json")
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model: EncoderDecoder = build_model(self.config.model).to_empty(device=self.device)
        try:
            self.model.load_state_dict(self._read(path, choice))
        except RuntimeError as error:
            raise CheckpointError(f"{self.checkpoint} does not fit {home / 'config.yaml'}: {error}") from None
        self.model.eval()
        others = [TrainedRun(other, replace(choice, ensemble=())) for other in choice.ensemble]
        self.scorer: Scorer = self._together_with(others) if others else self.model
        """What decodes: the model, or the ensemble."""
        self.ensemble = [str(other.checkpoint) for other in others]
        """The checkpoints of further models that decode with it."""

    def _together_with(self, others: Sequence["TrainedRun"]) -> Ensemble:
        for other in others:
            if other.tokenizer.sha256 != self.tokenizer.sha256:
                raise CheckpointError(
                    f"{other.checkpoint} has another tokenizer than {self.checkpoint}: only models of one "
                    "vocabulary decode together"
                )
        return Ensemble([self.model, *(other.model for other in others)])

    def _read(self, path: Path, choice: Choice) -> dict[str, Tensor]:
        check_files(self.checkpoint)
        weights = choice.weights
        if weights is None:
            with CheckpointReader(self.checkpoint) as reader:
                weights = self.config.evaluate.weights if reader.has("ema") else "current"
        self.weights = weights
        if choice.average is not None:
            checkpoints = newest_of(path, choice.average)
            self.averaged = [checkpoint.name for checkpoint in checkpoints]
            return dict(averaged_weights(checkpoints, weights))
        return load_weights(self.checkpoint, weights)

    def describe_weights(self) -> str:
        """What was read of the checkpoint, where it is more than its trained weights: for the end of a sentence."""
        moving = ", moving average" if self.weights == "ema" else ""
        mean = f", mean of {', '.join(self.averaged)}" if self.averaged else ""
        return moving + mean + (f", together with {', '.join(self.ensemble)}" if self.ensemble else "")
