"""The mesh of ranks: the one place with degree arithmetic. world = dp x tp, tp innermost."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from dist_transformer.config.layout import data_parallel_size
from dist_transformer.errors import ConfigError

COLLECTIVE_TIMEOUT = timedelta(minutes=30)
"""After this long a collective whose peers are gone fails instead of waiting."""


@dataclass(frozen=True)
class Mesh:
    """This rank's place among all ranks, and the groups it talks to. Also the `mpu` that DeepSpeed reads."""

    rank: int
    world_size: int
    local_rank: int
    dp_rank: int
    dp_size: int
    tp_rank: int
    tp_size: int
    device: torch.device
    dp_group: dist.ProcessGroup
    tp_group: dist.ProcessGroup

    @property
    def is_rank_zero(self) -> bool:
        """True on the one rank that writes files and talks to people."""
        return self.rank == 0

    # DeepSpeed asks for both spellings, by call.
    def get_model_parallel_rank(self) -> int:
        return self.tp_rank

    def get_model_parallel_world_size(self) -> int:
        return self.tp_size

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self.tp_group

    def get_tensor_model_parallel_rank(self) -> int:
        return self.tp_rank

    def get_tensor_model_parallel_world_size(self) -> int:
        return self.tp_size

    def get_tensor_model_parallel_group(self) -> dist.ProcessGroup:
        return self.tp_group

    def get_data_parallel_rank(self) -> int:
        return self.dp_rank

    def get_data_parallel_world_size(self) -> int:
        return self.dp_size

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self.dp_group


def world_from_environment() -> tuple[int, int, int]:
    """(rank, world size, local rank) as torchrun or srun set them; (0, 1, 0) for a process by itself."""
    for rank, world, local in (
        ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
        ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
    ):
        # A batch shell has SLURM_PROCID too; tasks that shall meet are told where (see `_check_rendezvous`).
        if rank in os.environ and world in os.environ and (rank == "RANK" or "MASTER_ADDR" in os.environ):
            return int(os.environ[rank]), int(os.environ[world]), int(os.environ.get(local, "0"))
    return 0, 1, 0


def _check_rendezvous() -> None:
    """Tasks of one job step that do not know of each other would each train alone, into one run directory.

    Raises:
        ConfigError: if srun started several tasks and nothing says where they meet.
    """
    is_task = "SLURM_STEP_ID" in os.environ and int(os.environ.get("SLURM_NTASKS", "1")) > 1
    if is_task and "RANK" not in os.environ and "MASTER_ADDR" not in os.environ:
        raise ConfigError(
            f"srun started {os.environ['SLURM_NTASKS']} tasks, but MASTER_ADDR is not set, so that they cannot meet: "
            f"export MASTER_ADDR (the first node's name) and MASTER_PORT in the batch script, or use slurm/train.sbatch"
        )


@contextmanager
def open_mesh(tp_degree: int = 1, init_method: str | None = None) -> Iterator[Mesh]:
    """Join the other ranks, and leave them at the end. NCCL where there is a GPU, else gloo.

    Args:
        init_method: where ranks meet, such as `file:///path`; default: MASTER_ADDR, or nobody for a single process.
    """
    _check_rendezvous()
    rank, world_size, local_rank = world_from_environment()
    dp_size = data_parallel_size(world_size, tp_degree)
    use_cuda = torch.cuda.is_available()
    device = torch.device("cuda", local_rank) if use_cuda else torch.device("cpu")
    if use_cuda and local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"rank {local_rank} of this machine has no GPU of its own: there are {torch.cuda.device_count()}; "
            f"start that many ranks, or hide the GPUs with CUDA_VISIBLE_DEVICES= to train on CPU"
        )
    if use_cuda:
        torch.cuda.set_device(device)
    os.environ.setdefault("LOCAL_RANK", str(local_rank))  # DeepSpeed insists on it
    os.environ.setdefault("MASTER_PORT", "29500")
    options: dict[str, Any] = {}
    if init_method is not None:
        options = {"init_method": init_method, "rank": rank, "world_size": world_size}
    elif "MASTER_ADDR" not in os.environ:
        options = {"store": torch._C._distributed_c10d.HashStore(), "rank": 0, "world_size": 1}
    elif "RANK" not in os.environ:
        options = {"rank": rank, "world_size": world_size}
    dist.init_process_group("nccl" if use_cuda else "gloo", timeout=COLLECTIVE_TIMEOUT, **options)
    try:
        yield _build_mesh(rank, world_size, local_rank, dp_size, tp_degree, device)
    finally:
        dist.destroy_process_group()


def _build_mesh(
    rank: int, world_size: int, local_rank: int, dp_size: int, tp_size: int, device: torch.device
) -> Mesh:
    dp_groups = [dist.new_group(list(range(tp, world_size, tp_size))) for tp in range(tp_size)]
    tp_groups = [dist.new_group(list(range(dp * tp_size, (dp + 1) * tp_size))) for dp in range(dp_size)]
    dp_rank, tp_rank = divmod(rank, tp_size)
    return Mesh(
        rank=rank,
        world_size=world_size,
        local_rank=local_rank,
        dp_rank=dp_rank,
        dp_size=dp_size,
        tp_rank=tp_rank,
        tp_size=tp_size,
        device=device,
        dp_group=dp_groups[tp_rank],
        tp_group=tp_groups[dp_rank],
    )
