"""One step's gradients and update are the same however it is split: ranks, micro-steps, packing, recomputing, ZeRO."""

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dist_transformer.config import Config, build_config
from dist_transformer.data.batch import Batch
from dist_transformer.data.token_ids import PAD_ID
from dist_transformer.engine.engine import Engine
from tests.dist.harness import Mesh, run_ranks

VOCAB, N_SAMPLES, SOURCE_LEN, TARGET_LEN = 96, 8, 14, 11
# Between any two ways to add the same float32 numbers.
RELATIVE = 1e-5


@dataclass(frozen=True)
class Split:
    """One way to do the step."""

    ranks: int = 1
    micro_batch_size: int = 8
    zero_stage: int = 0
    recompute: str = "none"
    packed: bool = False
    optimizer: str = "adamw"
    offload: str = "none"
    precision: str = "fp32"
    tp_degree: int = 1
    sequence_parallel: bool = True
    compile: bool = False
    attention: str = "sdpa"
    r_drop: float = 0.0


@dataclass
class Outcome:
    gradients: dict[str, Tensor] = field(default_factory=dict)
    grad_norm: float = 0.0
    losses: list[float] = field(default_factory=list)


def config_of(preset: str, split: Split, n_rows: int, **model: Any) -> Config:
    small = {
        "d_model": 32,
        "d_ff": 48,
        "n_heads": 4,
        "n_kv_heads": 2,
        "head_dim": 8,
        "n_encoder_layers": 2,
        "n_decoder_layers": 2,
    }
    return build_config(
        {
            "run": {"dir": "unused"},
            # Twins want some dropout; this one never happens.
            "model": {
                "preset": preset,
                "vocab_size": VOCAB,
                "dropout": 1e-12 if split.r_drop else 0.0,
                **small,
                **model,
            },
            "data": {"train": "unused"},
            "train": {
                "steps": 10,
                "global_batch_size": n_rows,
                "micro_batch_size": split.micro_batch_size,
                "precision": split.precision,
                "compile": split.compile,
                "attention": split.attention,
                "r_drop": split.r_drop,
                "label_smoothing": 0.1,
                "z_loss": 1e-3,
                "clip": 0.5,
            },
            "optimizer": {
                "name": split.optimizer,
                "lr": 0.01,
                "warmup_steps": 0,
                "schedule": "constant",
                "weight_decay": 0.01,
                "eps": 1e-6,
            },
            "parallel": {
                "zero_stage": split.zero_stage,
                "offload": split.offload,
                "tp_degree": split.tp_degree,
                "sequence_parallel": split.sequence_parallel,
            },
            "recompute": {"encoder": split.recompute, "decoder": split.recompute},
        }
    )


def samples() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    lengths = [(14, 3), (5, 11), (9, 9), (14, 11), (2, 1), (7, 4), (11, 2), (3, 6)]
    return [
        (
            torch.randint(3, VOCAB, (s,), generator=generator),
            torch.randint(3, VOCAB, (t,), generator=generator),
        )
        for s, t in lengths
    ]


def rows_of(packed: bool) -> Batch:
    """All samples: one to a row, or two to a row; padded rows fill up to eight, so that every split has its share."""
    chosen = samples()
    groups = (
        [chosen[i : i + 2] for i in range(0, N_SAMPLES, 2)] if packed else [[sample] for sample in chosen]
    )
    groups += [[] for _ in range(N_SAMPLES - len(groups))]
    source_len, target_len = (2 * SOURCE_LEN, 2 * TARGET_LEN) if packed else (SOURCE_LEN, TARGET_LEN)
    shapes = [(len(groups), source_len)] * 3 + [(len(groups), target_len)] * 4
    tensors = [torch.zeros(shape, dtype=torch.long) for shape in shapes]
    source, source_segments, source_positions, inputs, targets, segments, positions = tensors
    for row, group in enumerate(groups):
        at_source = at_target = 0
        for number, (s, t) in enumerate(group, start=1):
            place, to = slice(at_source, at_source + len(s)), slice(at_target, at_target + len(t))
            source[row, place], source_segments[row, place], source_positions[row, place] = (
                s,
                number,
                torch.arange(len(s)),
            )
            targets[row, to], segments[row, to], positions[row, to] = t, number, torch.arange(len(t))
            inputs[row, to] = torch.cat([torch.tensor([PAD_ID]), t[:-1]])
            at_source, at_target = at_source + len(s), at_target + len(t)
    return Batch(source, source_segments, source_positions, inputs, targets, segments, positions)


def part(batch: Batch, start: int, stop: int) -> Batch:
    tensors = {name: value[start:stop] for name, value in vars(batch).items() if isinstance(value, Tensor)}
    return replace(batch, **tensors)


def outcome(mesh: Mesh, preset: str, split: Split) -> Outcome:
    batch = rows_of(split.packed)
    n_rows = batch.encoder_input_tokens.shape[0]
    n_target_tokens = int((batch.decoder_target_tokens != PAD_ID).sum())
    engine = Engine(config_of(preset, split, n_rows), mesh)
    if split.r_drop:
        engine.model.decoder.register_forward_hook(tell_twins_apart)
    share = n_rows // mesh.dp_size
    starts = range(mesh.dp_rank * share, (mesh.dp_rank + 1) * share, split.micro_batch_size)
    micro_batches = [part(batch, start, start + split.micro_batch_size) for start in starts]
    found = Outcome()
    engine.set_learning_rate(1)
    sums = engine.accumulate(micro_batches, n_target_tokens)
    found.gradients = {name: gradient.clone().float() for name, gradient in engine.full_gradients().items()}
    found.grad_norm, _ = engine._update(sums)
    for step in range(2, 5):
        result = engine.train_step(micro_batches, n_target_tokens, step)
        total = result.sums.clone()
        if mesh.dp_size > 1:
            torch.distributed.all_reduce(total, group=mesh.dp_group)
        found.losses.append(float(total[0]) / n_target_tokens)
    return found


def tell_twins_apart(module: torch.nn.Module, inputs: object, output: Tensor) -> Tensor:
    """In place of dropout, which is another one in every split: the second half of the rows is a little more."""
    first, second = output.chunk(2)
    return torch.cat([first, second + second.roll(1, dims=-1)])


def outcomes(mesh: Mesh, preset: str, splits: list[Split]) -> list[Outcome]:
    return [outcome(mesh, preset, split) for split in splits]


def compare(actual: Outcome, expected: Outcome, split: Any) -> None:
    assert set(actual.gradients) == set(expected.gradients)
    total = torch.stack([gradient.norm() for gradient in expected.gradients.values()]).norm()
    assert total > 0.1
    # A key's bias moves all scores of a query alike, so that its true gradient is 0 and what is found is rounding only.
    noise = 1e-3 * total
    for name, gradient in expected.gradients.items():
        error = (actual.gradients[name] - gradient).norm() / gradient.norm().clamp(min=noise)
        assert error < RELATIVE, f"{split}: gradient of {name} differs by {error:.2e}"
    assert actual.grad_norm == pytest.approx(expected.grad_norm, rel=RELATIVE), split
    assert actual.losses == pytest.approx(expected.losses, rel=1e-4), split


ONE_RANK = [
    Split(micro_batch_size=4),
    Split(micro_batch_size=2, zero_stage=1),
    Split(packed=True),
    Split(recompute="full"),
    Split(zero_stage=1),
    Split(zero_stage=2),
    Split(zero_stage=3),
    Split(zero_stage=3, recompute="full", packed=True, micro_batch_size=4),
]
TWO_RANKS = [
    Split(ranks=2, micro_batch_size=4, zero_stage=stage, recompute=recompute, packed=packed)
    for stage, recompute, packed in [
        (0, "none", False),
        (1, "none", False),
        (2, "none", True),
        (3, "full", False),
    ]
] + [
    Split(ranks=2, micro_batch_size=2, zero_stage=2, recompute="full"),
    Split(ranks=2, micro_batch_size=2, zero_stage=3, packed=True),
    Split(ranks=2, micro_batch_size=4, zero_stage=2, offload="optimizer"),
    Split(ranks=2, micro_batch_size=4, zero_stage=3, offload="all"),
]


@pytest.mark.parametrize("preset", ["vaswani2017_base", "t5_v1_1_small", "modern_small"])
def test_every_split_gives_the_same_step(preset: str) -> None:
    [[expected, *found]] = run_ranks(1, outcomes, preset, [Split(), *ONE_RANK])
    for split, actual in zip(ONE_RANK, found, strict=True):
        compare(actual, expected, split)
    first, second = run_ranks(2, outcomes, preset, TWO_RANKS)
    for split, mine, other in zip(TWO_RANKS, first, second, strict=True):
        compare(mine, expected, split)
        compare(other, expected, split)


def test_rms_scaled_adamw_is_the_same_in_every_stage() -> None:
    """ZeRO hands the optimizer flat pieces; the scale of each step must still be each parameter's own."""
    splits = [
        Split(ranks=2, micro_batch_size=4, zero_stage=stage, optimizer="adamw_rms") for stage in (1, 2, 3)
    ]
    [[expected]] = run_ranks(1, outcomes, "t5_v1_1_small", [Split(optimizer="adamw_rms")])
    for split, actual in zip(splits, run_ranks(2, outcomes, "t5_v1_1_small", splits)[0], strict=True):
        compare(actual, expected, split)


def test_bf16_follows_fp32_in_every_stage() -> None:
    """Master weights in fp32: losses stay within bf16's rounding of the fp32 run's, in every stage alike."""
    splits = [
        Split(ranks=2, micro_batch_size=4, zero_stage=stage, precision="bf16") for stage in (0, 1, 2, 3)
    ]
    [[expected]] = run_ranks(1, outcomes, "modern_small", [Split()])
    for split, actual in zip(splits, run_ranks(2, outcomes, "modern_small", splits)[0], strict=True):
        assert actual.losses == pytest.approx(expected.losses, rel=1e-2), split
        assert actual.losses[-1] < actual.losses[0]


def test_twins_give_the_same_step_however_it_is_split() -> None:
    """R-Drop: both of a pair are in one micro-batch, and their divergence counts once for each target."""
    one_rank = [
        Split(micro_batch_size=2, r_drop=3.0),
        Split(zero_stage=2, packed=True, recompute="full", r_drop=3.0),
    ]
    two_ranks = [
        Split(ranks=2, micro_batch_size=micro_batch_size, zero_stage=stage, r_drop=3.0)
        for stage, micro_batch_size in [(0, 4), (1, 2), (2, 2), (3, 4)]
    ]
    shared = Split(ranks=2, tp_degree=2, micro_batch_size=4, r_drop=3.0)
    in_bf16 = [replace(split, precision="bf16") for split in two_ranks]
    [[without, expected, *found]] = run_ranks(
        1, outcomes, "modern_small", [Split(r_drop=1e-9), Split(r_drop=3.0), *one_rank]
    )
    # Thirty times what is allowed below.
    assert expected.losses != pytest.approx(without.losses, rel=3e-3), "twins do not diverge"
    for split, actual in zip(one_rank, found, strict=True):
        compare(actual, expected, split)
    on_two = run_ranks(2, outcomes, "modern_small", two_ranks + in_bf16)[0]
    for split, actual in zip(two_ranks, on_two, strict=False):
        compare(actual, expected, split)
    for split, actual in zip(in_bf16, on_two[len(two_ranks) :], strict=True):
        assert actual.losses == pytest.approx(expected.losses, rel=1e-2), split
    [of_shared] = run_ranks(2, outcomes, "modern_small", [shared], tp_degree=2)[0]
    assert of_shared.losses == pytest.approx(expected.losses, rel=1e-4)
    assert of_shared.grad_norm == pytest.approx(expected.grad_norm, rel=RELATIVE)
