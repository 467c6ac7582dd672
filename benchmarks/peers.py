"""One peer trained for a while: Hugging Face's Marian and T5, torch.nn.Transformer; benchmarks/train.py starts it.

    python -m benchmarks.peers marian --shards SHARDS --shape small --steps 60 [--warm-up 10]

Prints one line of JSON at the end. With several ranks (torchrun), gradients are averaged by DDP, through accelerate.
"""

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.shapes import (
    SHAPES,
    TARGET_TOKENS,
    Pair,
    Shape,
    batches_by_length,
    padded,
    read_pairs,
    work_of,
)
from dist_transformer.data.token_ids import EOS_ID, PAD_ID
from dist_transformer.model.flops import Work

LEARNING_RATE = 1e-3
DROPOUT = 0.1

Step = Callable[[nn.Module, list[Pair]], Tensor]
"""The loss of a batch, a mean over its target tokens."""


def marian(shape: Shape, vocab_size: int) -> tuple[nn.Module, Step]:
    """Hugging Face's Marian: the paper's model, post-norm."""
    from transformers import MarianConfig, MarianMTModel

    config = MarianConfig(
        vocab_size=vocab_size,
        decoder_vocab_size=vocab_size,
        d_model=shape.d_model,
        encoder_layers=shape.n_layers,
        decoder_layers=shape.n_layers,
        encoder_attention_heads=shape.n_heads,
        decoder_attention_heads=shape.n_heads,
        encoder_ffn_dim=shape.d_ff,
        decoder_ffn_dim=shape.d_ff,
        activation_function="relu",
        dropout=DROPOUT,
        attention_dropout=0.0,
        activation_dropout=0.0,
        scale_embedding=True,
        pad_token_id=PAD_ID,
        eos_token_id=EOS_ID,
        decoder_start_token_id=PAD_ID,
        attn_implementation="sdpa",
    )
    return MarianMTModel(config), _huggingface_loss


def t5(shape: Shape, vocab_size: int) -> tuple[nn.Module, Step]:
    """Hugging Face's T5, as large: ReLU, tied embeddings."""
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=vocab_size,
        d_model=shape.d_model,
        d_kv=shape.d_model // shape.n_heads,
        d_ff=shape.d_ff,
        num_layers=shape.n_layers,
        num_heads=shape.n_heads,
        dropout_rate=DROPOUT,
        pad_token_id=PAD_ID,
        eos_token_id=EOS_ID,
        decoder_start_token_id=PAD_ID,
    )
    return T5ForConditionalGeneration(config), _huggingface_loss


def _huggingface_loss(model: nn.Module, pairs: list[Pair]) -> Tensor:
    source, target = padded([s for s, _ in pairs]), padded([t for _, t in pairs])
    labels = target.masked_fill(target == PAD_ID, -100)
    loss: Tensor = model(
        input_ids=source, attention_mask=(source != PAD_ID).long(), labels=labels, use_cache=False
    ).loss
    return loss


class TorchTransformer(nn.Module):
    """torch.nn.Transformer between a tied embedding with sinusoids and its transpose."""

    def __init__(self, shape: Shape, vocab_size: int, max_len: int = 512) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, shape.d_model, padding_idx=PAD_ID)
        nn.init.normal_(self.embedding.weight, std=shape.d_model**-0.5)
        self.core = nn.Transformer(
            shape.d_model,
            shape.n_heads,
            shape.n_layers,
            shape.n_layers,
            shape.d_ff,
            DROPOUT,
            batch_first=True,
        )
        self.dropout = nn.Dropout(DROPOUT)
        angles = torch.arange(max_len)[:, None] / 10_000 ** (
            torch.arange(0, shape.d_model, 2) / shape.d_model
        )
        self.register_buffer("positions", torch.cat([angles.sin(), angles.cos()], dim=1))

    def embed(self, tokens_BS: Tensor) -> Tensor:
        scaled = self.embedding(tokens_BS) * self.embedding.embedding_dim**0.5
        positions = self.get_buffer("positions")[: tokens_BS.shape[1]]
        embedded: Tensor = self.dropout(scaled + positions)
        return embedded

    def forward(self, source_BS: Tensor, target_BT: Tensor) -> Tensor:
        input_BT = torch.cat([torch.full_like(target_BT[:, :1], PAD_ID), target_BT[:, :-1]], dim=1)
        mask = nn.Transformer.generate_square_subsequent_mask(target_BT.shape[1])
        hidden = self.core(
            self.embed(source_BS),
            self.embed(input_BT),
            tgt_mask=mask,
            tgt_is_causal=True,
            src_key_padding_mask=source_BS == PAD_ID,
            memory_key_padding_mask=source_BS == PAD_ID,
        )
        logits = F.linear(hidden, self.embedding.weight)
        return F.cross_entropy(logits.flatten(0, 1), target_BT.flatten(), ignore_index=PAD_ID)


def torch_transformer(shape: Shape, vocab_size: int) -> tuple[nn.Module, Step]:
    """torch.nn.Transformer."""

    def loss(model: nn.Module, pairs: list[Pair]) -> Tensor:
        value: Tensor = model(padded([s for s, _ in pairs]), padded([t for _, t in pairs]))
        return value

    return TorchTransformer(shape, vocab_size), loss


PEERS = {"marian": marian, "t5": t5, "torch": torch_transformer}


class Meter:
    """Counts from the end of the warm-up on."""

    def __init__(self, warm_up: int) -> None:
        self.warm_up, self.step = warm_up, 0
        self.first_step_at = self.began = self.ended = 0.0
        self.work, self.n_positions = Work(), 0

    def after(self, pairs: list[Pair]) -> None:
        """After an update with these pairs."""
        self.step, now = self.step + 1, time.time()
        if self.step == 1:
            self.first_step_at = now
        if self.step == self.warm_up:
            self.began = now
        if self.step > self.warm_up:
            self.ended = now
            self.work += work_of(pairs)
            self.n_positions += len(pairs) * (max(len(s) for s, _ in pairs) + max(len(t) for _, t in pairs))

    def report(self) -> dict[str, float]:
        """Seconds, and this rank's counts."""
        return {
            "first_step_at": self.first_step_at,
            "seconds": self.ended - self.began,
            "n_positions": self.n_positions,
            "work": self.work.as_tuple(),  # type: ignore[dict-item]
        }


def loop(
    build: Callable[[Shape, int], tuple[nn.Module, Step]], options: argparse.Namespace
) -> dict[str, float]:
    """A hand-written loop over batches of like lengths, with accelerate."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    torch.manual_seed(1)
    pairs, vocab_size = read_pairs(options.shards)
    model, loss_of = build(SHAPES[options.shape], vocab_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)
    model, optimizer = accelerator.prepare(model, optimizer)
    model.train()
    meter = Meter(options.warm_up)
    n_ranks, rank = accelerator.num_processes, accelerator.process_index
    batches: Iterator[list[Pair]] = batches_by_length(pairs, 1, TARGET_TOKENS)
    for _ in range(options.warm_up + options.steps):
        batch = next(batches)[rank::n_ranks]
        loss = loss_of(model, batch)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        meter.after(batch)
    return meter.report()


def trainer(options: argparse.Namespace) -> dict[str, float]:
    """Hugging Face's Seq2SeqTrainer with Marian, grouping by length: pairs a batch, since it has no token budget."""
    from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, TrainerCallback

    torch.manual_seed(1)
    pairs, vocab_size = read_pairs(options.shards)
    model, _ = marian(SHAPES[options.shape], vocab_size)
    mean_length = sum(len(target) for _, target in pairs) / len(pairs)
    meter, seen = Meter(options.warm_up), []

    def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
        source, target = padded([r["input_ids"] for r in rows]), padded([r["labels"] for r in rows])
        seen.append([(r["input_ids"], r["labels"]) for r in rows])
        return {
            "input_ids": source,
            "attention_mask": (source != PAD_ID).long(),
            "labels": target.masked_fill(target == PAD_ID, -100),
        }

    class Count(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            meter.after(seen.pop(0))

    arguments = Seq2SeqTrainingArguments(
        output_dir=os.environ.get("TMPDIR", "/tmp"),
        use_cpu=True,
        per_device_train_batch_size=round(
            TARGET_TOKENS / mean_length / int(os.environ.get("WORLD_SIZE", "1"))
        ),
        max_steps=options.warm_up + options.steps,
        train_sampling_strategy="group_by_length",
        learning_rate=LEARNING_RATE,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        remove_unused_columns=False,
        logging_strategy="no",
    )
    rows = [{"input_ids": s, "labels": t} for s, t in pairs]
    Seq2SeqTrainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        data_collator=collate,
        callbacks=[Count()],
    ).train()
    return meter.report()


def main() -> None:
    """Train and print the counts."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("peer", choices=[*PEERS, "trainer"])
    parser.add_argument("--shards", type=Path, required=True)
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--warm-up", type=int, default=10)
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    report = trainer(options) if options.peer == "trainer" else loop(PEERS[options.peer], options)
    # In one piece: torchrun's ranks write unbuffered into one file.
    print(json.dumps(report) + "\n", end="", flush=True)


if __name__ == "__main__":
    main()
