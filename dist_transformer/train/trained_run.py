"""A run's weights as a model on one process, whatever layout wrote them."""

from pathlib import Path

import torch

from dist_transformer.checkpoints.folder import latest_checkpoint
from dist_transformer.checkpoints.reader import load_weights
from dist_transformer.config import Config, load_config
from dist_transformer.data.tokenizer import TextTokenizer
from dist_transformer.errors import CheckpointError
from dist_transformer.model import EncoderDecoder, build_model


class TrainedRun:
    """A run's newest checkpoint (or a given one) as a model, with its tokenizer and configuration.

    Raises:
        CheckpointError: if there is no run, no checkpoint, or it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        checkpoint = path if (path / "trainer.json").exists() else latest_checkpoint(path)
        run_dir = path.parent.parent if checkpoint == path else path
        if not (run_dir / "config.yaml").exists():
            raise CheckpointError(f"{run_dir}: no run there: config.yaml is missing")
        if checkpoint is None:
            raise CheckpointError(f"{run_dir}: no checkpoint yet")
        self.config: Config = load_config(run_dir / "config.yaml")
        self.tokenizer = TextTokenizer.load(run_dir / "tokenizer.json")
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model: EncoderDecoder = build_model(self.config.model).to_empty(device=self.device)
        weights = load_weights(checkpoint)
        try:
            self.model.load_state_dict(weights)
        except RuntimeError as error:
            raise CheckpointError(f"{checkpoint} does not fit {run_dir / 'config.yaml'}: {error}") from None
        self.model.eval()
