"""Hugging Face's T5 of the same shape on the same samples: padded, in buckets of like lengths, as it needs them."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.gpu_sections.measure import Figures, Peaks, search, time_size
from benchmarks.gpu_sections.ours import config_of
from benchmarks.gpu_sections.rows import Pool
from benchmarks.gpu_sections.task import Task, UnavailableError, first_line
from dist_transformer.config import ModelConfig
from dist_transformer.data.batch import Batch
from dist_transformer.data.token_ids import EOS_ID, PAD_ID

ATTENTIONS = ("sdpa", "eager")
"""The best first; whether T5 has it depends on the version."""
WIDTH = 8
"""Widths are multiples of it, which is what tensor cores like."""
IGNORED = -100


def build_t5(model: ModelConfig) -> tuple[nn.Module, str]:
    """T5ForConditionalGeneration with random weights, and the attention that it uses.

    Raises:
        UnavailableError: without transformers.
    """
    try:
        from transformers import T5Config, T5ForConditionalGeneration
    except ImportError as error:
        raise UnavailableError(f"transformers cannot be imported: {error}") from None
    stack = model.stack("encoder")
    config = T5Config(
        vocab_size=model.vocab_size,
        d_model=stack.d_model,
        d_kv=stack.head_dim,
        d_ff=stack.d_ff,
        num_layers=model.n_encoder_layers,
        num_decoder_layers=model.n_decoder_layers,
        num_heads=stack.n_heads,
        relative_attention_num_buckets=model.relative_buckets,
        relative_attention_max_distance=model.relative_max_distance,
        dropout_rate=model.dropout,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        use_cache=False,
        pad_token_id=PAD_ID,
        eos_token_id=EOS_ID,
        decoder_start_token_id=PAD_ID,
    )
    why = ""
    for attention in ATTENTIONS:
        try:
            built = T5ForConditionalGeneration._from_config(config, attn_implementation=attention)
        except (ValueError, ImportError) as error:
            why = first_line(error)
            continue
        if built.lm_head.weight is built.shared.weight:
            # Some versions tie whatever the configuration says.
            built.lm_head.weight = nn.Parameter(built.shared.weight.detach().clone())
        return built, str(getattr(built.config, "_attn_implementation", attention))
    raise UnavailableError(f"this version of transformers builds no T5: {why}")


class Peer:
    """The model in bf16 with torch's fused AdamW, gradients clipped as ours are.

    Weights and moments are bf16 too: without fp32 copies it is as fast as it gets, and trains less exactly than ours.
    """

    def __init__(self, task: Task, model: ModelConfig) -> None:
        torch.manual_seed(1)
        self.device = torch.device(task.setting.device)
        built, self.attention = build_t5(model)
        self.model = built.to(device=self.device, dtype=torch.bfloat16).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        self.forward: Any = self.model
        if task.arguments["compiled"]:
            # Widths and rows differ from bucket to bucket: one graph for all instead of one for each, also where
            # two of them happen to be equal.
            from torch.fx.experimental import _config as shape_config

            shape_config.use_duck_shape = False
            self.forward = torch.compile(self.model, dynamic=True, backend=task.setting.compile_backend)

    def step(self, batches: Sequence[Batch]) -> Tensor:
        """One update; returns the loss a target token."""
        n_target_tokens = sum(batch.n_target_tokens for batch in batches)
        losses = []
        for batch in batches:
            loss = self._loss(batch) * (batch.n_target_tokens / n_target_tokens)
            loss.backward()  # type: ignore[no-untyped-call]
            losses.append(loss.detach())
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return torch.stack(losses).sum()

    def _loss(self, batch: Batch) -> Tensor:
        source, target = (
            _widened(tokens).to(self.device, non_blocking=True)
            for tokens in (batch.encoder_input_tokens, batch.decoder_target_tokens)
        )
        labels = target.masked_fill(target == PAD_ID, IGNORED)
        loss: Tensor = self.forward(
            input_ids=source, attention_mask=(source != PAD_ID).long(), labels=labels
        ).loss
        return loss


def _widened(tokens: Tensor) -> Tensor:
    return F.pad(tokens, (0, -tokens.shape[1] % WIDTH), value=PAD_ID)


def hf(task: Task) -> None:
    """Tokens a second, useful operations and memory, by one formula with ours, at every size of the buckets."""
    setting, pool, peaks = task.setting, Pool(task.setting), Peaks.of(task)
    model = config_of(setting, task.arguments["preset"], "none", 1, pool.vocab_size).model
    task.add(preset=task.arguments["preset"], compiled=task.arguments["compiled"], peak=peaks.source)
    peer = Peer(task, model)
    task.add(
        n_parameters=sum(parameter.numel() for parameter in peer.model.parameters()),
        attention=peer.attention, precision="bf16 weights and moments",
    )  # fmt: skip

    def measure(rows: int) -> Figures:
        return time_size(task, rows, pool.buckets(rows * setting.source_len), peer.step, model, peaks)

    search(task, measure)
