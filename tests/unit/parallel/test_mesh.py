"""Ranks as launchers tell them, and who talks to whom, without starting any."""

from typing import Any

import pytest
import torch

from dist_transformer.config.layout import data_parallel_size
from dist_transformer.errors import ConfigError
from dist_transformer.parallel import mesh as mesh_module
from dist_transformer.parallel.mesh import world_from_environment

NAMES = (
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "MASTER_ADDR",
)  # fmt: skip
TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "node0"}
SRUN = {"SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_LOCALID": "1"}


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, (0, 1, 0)),
        (TORCHRUN, (5, 8, 1)),
        ({**SRUN, "MASTER_ADDR": "node0"}, (3, 4, 1)),
        # A shell inside a Slurm job is no rank: nobody has said where ranks meet.
        (SRUN, (0, 1, 0)),
        # torchrun started by srun: torchrun's ranks count.
        ({**SRUN, **TORCHRUN}, (5, 8, 1)),
        ({"RANK": "1", "WORLD_SIZE": "2"}, (1, 2, 0)),
    ],
)
def test_world(
    variables: dict[str, str], expected: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert world_from_environment() == expected


def test_degrees() -> None:
    assert [data_parallel_size(8, tp) for tp in (1, 2, 4, 8)] == [8, 4, 2, 1]
    with pytest.raises(ConfigError, match=r"parallel\.tp_degree=3 does not divide the 8 ranks"):
        data_parallel_size(8, 3)
    with pytest.raises(ConfigError, match=r"tp_degree=4 does not divide the 2 ranks"):
        data_parallel_size(2, 4)


def mesh_of(rank: int, world_size: int, tp_size: int, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The mesh of one rank, its groups as the lists of their ranks; and all groups that were made."""
    made: list[tuple[int, ...]] = []

    def new_group(ranks: list[int]) -> tuple[int, ...]:
        made.append(tuple(ranks))
        return tuple(ranks)

    monkeypatch.setattr(torch.distributed, "new_group", new_group)
    cpu = torch.device("cpu")
    return mesh_module._build_mesh(rank, world_size, rank, world_size // tp_size, tp_size, cpu), made


@pytest.mark.parametrize(
    ("tp_size", "dp_groups", "tp_groups"),
    [
        (1, [(0, 1, 2, 3)], [(0,), (1,), (2,), (3,)]),
        (2, [(0, 2), (1, 3)], [(0, 1), (2, 3)]),
        (4, [(0,), (1,), (2,), (3,)], [(0, 1, 2, 3)]),
    ],
)
def test_tp_is_innermost(
    tp_size: int,
    dp_groups: list[tuple[int, ...]],
    tp_groups: list[tuple[int, ...]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    orders = []
    for rank in range(4):
        mesh, made = mesh_of(rank, 4, tp_size, monkeypatch)
        orders.append(made)
        assert (mesh.dp_rank, mesh.tp_rank) == (rank // tp_size, rank % tp_size)
        assert (mesh.dp_size, mesh.tp_size) == (4 // tp_size, tp_size)
        assert mesh.dp_group in dp_groups
        assert mesh.tp_group in tp_groups
        assert mesh.dp_group[mesh.dp_rank] == mesh.tp_group[mesh.tp_rank] == rank
        assert mesh.is_rank_zero == (rank == 0)
    # Every rank makes every group, in the same order: torch.distributed needs that.
    assert all(order == [*dp_groups, *tp_groups] for order in orders)


def test_what_deepspeed_asks_the_mesh(monkeypatch: pytest.MonkeyPatch) -> None:
    mesh: Any = mesh_of(2, 4, 2, monkeypatch)[0]
    for name in ("get_model_parallel", "get_tensor_model_parallel"):
        assert getattr(mesh, f"{name}_rank")() == 0
        assert getattr(mesh, f"{name}_world_size")() == 2
        assert getattr(mesh, f"{name}_group")() == (2, 3)
    assert mesh.get_data_parallel_rank() == 1
    assert mesh.get_data_parallel_world_size() == 2
    assert mesh.get_data_parallel_group() == (0, 2)
