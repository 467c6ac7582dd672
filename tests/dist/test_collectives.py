"""Sums, gathered objects, and errors that end every rank."""

from typing import Any

import torch

from dist_transformer.errors import CheckpointError, DataError
from dist_transformer.parallel.collectives import (
    barrier,
    gather_objects,
    raise_together,
    sum_over_data_parallel,
)
from tests.dist.harness import Mesh, run_ranks


def caught(error: Exception | None, mesh: Mesh) -> tuple[str, str, bool] | None:
    try:
        raise_together(error, mesh)
    except Exception as found:
        return type(found).__name__, str(found), getattr(found, "on_every_rank", False)
    return None


def everything(mesh: Mesh) -> dict[str, Any]:
    own = DataError(f"shard of rank {mesh.rank}")
    barrier(mesh)
    return {
        "sum": sum_over_data_parallel(torch.tensor([mesh.rank + 1, 10]), mesh).tolist(),
        "objects": gather_objects({"rank": mesh.rank, "text": "x" * (mesh.rank + 1)}, mesh),
        "nobody": caught(None, mesh),
        "only the last": caught(own if mesh.rank == mesh.world_size - 1 else None, mesh),
        "only the first": caught(CheckpointError("bad file") if mesh.rank == 0 else None, mesh),
        "everyone": caught(own, mesh),
        "layout": (mesh.dp_rank, mesh.dp_size, mesh.tp_rank, mesh.tp_size),
    }


def test_two_ranks() -> None:
    ranks = run_ranks(2, everything, limit_s=60)
    for rank, found in enumerate(ranks):
        assert found["sum"] == [3, 20]
        assert found["objects"] == [{"rank": 0, "text": "x"}, {"rank": 1, "text": "xx"}]
        assert found["nobody"] is None
        assert found["only the last"] == ("DataError", "shard of rank 1", True)
        assert found["only the first"] == ("CheckpointError", "bad file", True)
        # Each rank keeps its own error, and with it its traceback.
        assert found["everyone"] == ("DataError", f"shard of rank {rank}", True)
        assert found["layout"] == (rank, 2, 0, 1)


def test_one_rank() -> None:
    [found] = run_ranks(1, everything, limit_s=60)
    assert found["sum"] == [1, 10]
    assert found["objects"] == [{"rank": 0, "text": "x"}]
    assert found["nobody"] is None
    assert found["everyone"] == ("DataError", "shard of rank 0", True)
