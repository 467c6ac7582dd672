"""The module that DeepSpeed wraps: the model and its loss, from a batch to sums over target tokens."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_transformer.config import TrainConfig
from dist_transformer.data.batch import Batch
from dist_transformer.data.token_ids import PAD_ID
from dist_transformer.model import EncoderDecoder
from dist_transformer.parallel.cross_entropy import TokenLoss, linear_cross_entropy
from dist_transformer.parallel.regions import TensorParallel


class TrainingModule(nn.Module):
    """Model and loss. In evaluation mode the objective is the plain cross-entropy.

    With `train.r_drop` each row goes through the model twice, as two rows, so that dropout differs.

    Args:
        tp: the ranks that share the model.
    """

    def __init__(self, model: EncoderDecoder, train: TrainConfig, tp: TensorParallel) -> None:
        super().__init__()
        self.model, self.train_config, self.tp = model, train, tp

    def forward(self, batch: Batch) -> TokenLoss:
        """Sums over the batch's target tokens; padding does not count."""
        r_drop = self.train_config.r_drop if self.training else 0.0

        def rows(x_BT: Tensor) -> Tensor:
            x_BT = self._even(x_BT)
            return torch.cat([x_BT, x_BT]) if r_drop else x_BT

        hidden_BTD = self.model(
            rows(batch.encoder_input_tokens),
            rows(batch.encoder_segment_ids),
            rows(batch.encoder_positions),
            rows(batch.decoder_input_tokens),
            rows(batch.decoder_segment_ids),
            rows(batch.decoder_positions),
        )
        return linear_cross_entropy(
            hidden_BTD.flatten(0, 1),
            self.model.output_weight,
            rows(batch.decoder_target_tokens).flatten(),
            ignore_id=PAD_ID,
            label_smoothing=self.train_config.label_smoothing if self.training else 0.0,
            z_loss=self.train_config.z_loss if self.training else 0.0,
            r_drop=r_drop,
            chunk_rows=self.train_config.loss_chunk_rows,
            tp=self.tp,
        )

    def _even(self, x_BT: Tensor) -> Tensor:
        """With sequence parallelism: padded, if need be, to a length that the ranks can share equally."""
        missing = -x_BT.shape[1] % self.tp.size if self.tp.sequence else 0
        return F.pad(x_BT, (0, missing), value=PAD_ID) if missing else x_BT
