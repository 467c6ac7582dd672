"""The module that DeepSpeed wraps: the model and its loss, from a batch to sums over target tokens."""

from torch import nn

from dist_transformer.config import TrainConfig
from dist_transformer.data.batch import PAD_ID, Batch
from dist_transformer.model import EncoderDecoder
from dist_transformer.parallel.cross_entropy import TokenLoss, linear_cross_entropy


class TrainingModule(nn.Module):
    """Model and loss. In evaluation mode the objective is the plain cross-entropy."""

    def __init__(self, model: EncoderDecoder, train: TrainConfig) -> None:
        super().__init__()
        self.model, self.train_config = model, train

    def forward(self, batch: Batch) -> TokenLoss:
        """Sums over the batch's target tokens; padding does not count."""
        hidden_BTD = self.model(
            batch.encoder_input_tokens,
            batch.encoder_segment_ids,
            batch.encoder_positions,
            batch.decoder_input_tokens,
            batch.decoder_segment_ids,
            batch.decoder_positions,
        )
        return linear_cross_entropy(
            hidden_BTD.flatten(0, 1),
            self.model.output_weight,
            batch.decoder_target_tokens.flatten(),
            ignore_id=PAD_ID,
            label_smoothing=self.train_config.label_smoothing if self.training else 0.0,
            z_loss=self.train_config.z_loss if self.training else 0.0,
            chunk_rows=self.train_config.loss_chunk_rows,
        )
