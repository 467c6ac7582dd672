"""A checkpoint gives back weights, optimizer and random generators bit for bit, in every stage and precision."""

import errno
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dist_transformer.checkpoints.folder import TrainerState, latest_checkpoint, list_checkpoints
from dist_transformer.checkpoints.reader import load_weights
from dist_transformer.config import Config, build_config
from dist_transformer.data.token_ids import PAD_ID
from dist_transformer.engine.checkpoint import check_checkpoint, load_checkpoint
from dist_transformer.engine.engine import Engine
from dist_transformer.engine.saving import Saver, save_checkpoint
from dist_transformer.errors import CheckpointError
from dist_transformer.parallel.collectives import barrier
from tests.dist.harness import Mesh, run_ranks
from tests.dist.test_bad_steps import name_of, weights_of
from tests.dist.test_gradients import Split, config_of, part, rows_of

SPLITS = [
    Split(micro_batch_size=2, zero_stage=stage, precision=precision, offload=offload, optimizer=optimizer)
    for stage, precision, offload, optimizer in [
        (0, "fp32", "none", "adamw"),
        (0, "bf16", "none", "adamw"),
        (1, "fp32", "none", "adamw_rms"),
        (1, "bf16", "none", "adamw"),
        (2, "fp32", "none", "adamw"),
        (2, "bf16", "optimizer", "adamw_rms"),
        (3, "fp32", "none", "adamw_rms"),
        (3, "bf16", "none", "adamw"),
    ]
]


def configured(split: Split, run_dir: str) -> Config:
    """As for the gradients, with dropout: its random numbers are part of what is restored."""
    tree = config_of("modern_small", split, 8).model_dump(mode="json")
    tree["run"]["dir"], tree["model"]["dropout"] = run_dir, 0.2
    return build_config(tree)


def train(engine: Engine, steps: range) -> list[float]:
    """The steps' losses on this rank, and their gradient norms."""
    batch, mesh = rows_of(packed=False), engine.mesh
    n_target_tokens = int((batch.decoder_target_tokens != PAD_ID).sum())
    share, size = 8 // mesh.dp_size, engine.config.train.micro_batch_size
    starts = range(mesh.dp_rank * share, (mesh.dp_rank + 1) * share, size)
    micro_batches = [part(batch, start, start + size) for start in starts]
    found = []
    for step in steps:
        result = engine.train_step(micro_batches, n_target_tokens, step)
        found += [float(result.sums[0]), result.grad_norm]
    return found


def master_weights(engine: Engine) -> dict[str, Tensor]:
    """The optimizer's own weights: float32, also where the model's are bfloat16. A collective."""
    from deepspeed.utils import safe_get_full_fp32_param

    optimizer = engine.optimizer
    if hasattr(optimizer, "fp32_groups"):
        groups = zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)
        copies = {id(own): copy for owns, copies in groups for own, copy in zip(owns, copies, strict=True)}
        values = {name: copies[id(own)] for name, own in engine.model.named_parameters()}
    elif engine.config.parallel.zero_stage == 0:
        values = dict(engine.model.named_parameters())
    else:
        values = {name: safe_get_full_fp32_param(own) for name, own in engine.model.named_parameters()}
    assert all(value.dtype == torch.float32 for value in values.values())
    return {name: value.detach().clone() for name, value in values.items()}


def there_and_back(mesh: Mesh, split: Split, run_dir: str) -> dict[str, Any]:
    config = configured(split, run_dir)
    engine = Engine(config, mesh)
    train(engine, range(1, 4))
    masters = master_weights(engine)
    state = TrainerState(step=3, tokens_seen=77, data={"cursors": {"0": [0, 0, 0, 1]}})
    path = save_checkpoint(engine, state)
    expected = train(engine, range(4, 7)), weights_of(engine)

    check_checkpoint(path, config, mesh)
    resumed = Engine(config, mesh)
    torch.manual_seed(99)
    found_state = load_checkpoint(resumed, path)
    restored = master_weights(resumed)
    actual = train(resumed, range(4, 7)), weights_of(resumed)
    # Other random numbers would have given other losses.
    load_checkpoint(resumed, path)
    torch.manual_seed(99)
    return {
        "same_state": found_state == state,
        "same_masters": equal(masters, restored),
        "expected": expected[0],
        "actual": actual[0],
        "same_weights": equal(expected[1], actual[1]),
        "other_dropout": train(resumed, range(4, 5)),
        "masters": masters,
        "path": str(path),
    }


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def all_there_and_back(mesh: Mesh, splits: list[Split], folder: str) -> list[dict[str, Any]]:
    return [there_and_back(mesh, split, f"{folder}/{mesh.world_size}-{name_of(split)}") for split in splits]


Found = tuple[list[dict[str, Any]], list[str], list[tuple[str, int | None]]]


def everything(mesh: Mesh, folder: str) -> Found:
    """One start of the ranks for all tests of this file."""
    return (
        all_there_and_back(mesh, SPLITS, folder),
        spoil_and_load(mesh, folder),
        save_while_one_cannot_write(mesh, f"{folder}/full"),
    )


@pytest.fixture(scope="module")
def found() -> Any:
    with tempfile.TemporaryDirectory() as folder:
        yield run_ranks(2, everything, folder, limit_s=280)


@pytest.fixture(scope="module")
def outcomes(found: list[Found]) -> list[list[dict[str, Any]]]:
    return [first for first, *_ in found]


@pytest.mark.parametrize("index", range(len(SPLITS)), ids=[name_of(split) for split in SPLITS])
def test_resumed_as_if_never_stopped(index: int, outcomes: list[list[dict[str, Any]]]) -> None:
    for rank in outcomes:
        found = rank[index]
        assert found["same_state"]
        assert found["same_masters"]
        assert found["actual"] == found["expected"]
        assert found["same_weights"]
        assert found["other_dropout"][0] != found["expected"][0]


@pytest.mark.parametrize("index", range(len(SPLITS)), ids=[name_of(split) for split in SPLITS])
def test_weights_without_an_engine(index: int, outcomes: list[list[dict[str, Any]]]) -> None:
    found = outcomes[0][index]
    weights = load_weights(Path(found["path"]))
    assert weights.keys() == found["masters"].keys()
    for name, weight in weights.items():
        assert weight.dtype == torch.float32
        assert torch.equal(weight, found["masters"][name]), name


def test_files_of_a_checkpoint(outcomes: list[list[dict[str, Any]]]) -> None:
    for found in outcomes[0]:
        path = Path(found["path"])
        assert latest_checkpoint(path.parent.parent) == path
        assert list_checkpoints(path.parent.parent) == [path]
        assert sorted(entry.name for entry in path.parent.iterdir()) == ["latest", "step-00000003"]
        written = sorted(file.name for file in path.glob("*.safetensors"))
        assert written == [f"rank-{rank:05d}.safetensors" for rank in range(len(outcomes))]


def test_every_file_is_checked_before_weights_are_read(outcomes: list[list[dict[str, Any]]]) -> None:
    for found in outcomes[0][:3]:
        path = Path(found["path"])
        for file in sorted(path.glob("*.safetensors")):
            content = file.read_bytes()
            file.write_bytes(content[: len(content) // 2])
            with pytest.raises(CheckpointError, match=rf"{file.name} has .* the checkpoint is damaged"):
                load_weights(path)
            file.write_bytes(content)


def spoil_and_load(mesh: Mesh, folder: str) -> list[str]:
    """One rank's file is damaged behind the size check: every rank ends, with that rank's sentence."""
    said = []
    for stage in (0, 2, 3):
        config = configured(Split(micro_batch_size=2, zero_stage=stage), f"{folder}/{stage}")
        engine = Engine(config, mesh)
        path = save_checkpoint(engine, TrainerState(step=1))
        if mesh.rank == 1:
            file = path / "rank-00001.safetensors"
            file.write_bytes(b"\0" * file.stat().st_size)
        barrier(mesh)
        try:
            load_checkpoint(engine, path)
        except CheckpointError as error:
            assert getattr(error, "on_every_rank", False)
            said.append(str(error))
    return said


def save_while_one_cannot_write(mesh: Mesh, run_dir: str) -> list[tuple[str, int | None]]:
    """Three saves while training goes on; in the second, rank 1's disk is full. (Sentence, step of `latest`) each."""
    config = configured(Split(micro_batch_size=2, zero_stage=2), run_dir)
    engine = Engine(config, mesh)
    saver = Saver(engine)
    seen: list[tuple[str, int | None]] = []
    real = os.fsync

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "rank-00001.safetensors")

    for number in (1, 2, 3):
        os.fsync = full if number == 2 and mesh.rank == 1 else real
        ended = saver.begin(TrainerState(step=2 * number))
        train(engine, range(2 * number, 2 * number + 1))
        while not ended:
            time.sleep(0.01)
            ended = saver.poll()
        os.fsync = real
        [outcome] = ended
        latest = latest_checkpoint(Path(run_dir))
        seen.append((outcome.error or "", int(latest.name.split("-")[1]) if latest else None))
    return seen


def test_no_rank_waits_for_one_that_cannot_write(found: list[Found]) -> None:
    for *_, seen in found:
        assert seen == [
            ("", 2),
            (
                "the checkpoint of step 4 was not saved: rank 1: rank-00001.safetensors: No space left on device; "
                "step-00000002 is still whole",
                2,
            ),
            ("", 6),
        ]


def test_a_file_damaged_in_place(found: list[Found]) -> None:
    first, second = (said for _, said, _ in found)
    assert first == second
    assert len(first) == 3
    assert all("cannot be loaded" in sentence and "\n" not in sentence for sentence in first)
