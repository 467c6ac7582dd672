"""Runs a function on N gloo ranks with a file store and a hard time limit, so that a hang fails."""

import contextlib
import io
import os
import queue
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.multiprocessing as mp

from dist_transformer.parallel.mesh import Mesh, open_mesh

LIMIT_S = 150


def _rank_main(
    rank: int,
    world_size: int,
    tp_degree: int,
    store: str,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    results: Any,
) -> None:
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank), CUDA_VISIBLE_DEVICES=""
    )
    torch.set_num_threads(1)
    try:
        with open_mesh(tp_degree, init_method=f"file://{store}") as mesh:
            results.put((rank, _to_bytes(function(mesh, *arguments)), None))
    except BaseException:
        results.put((rank, None, traceback.format_exc()))
        raise


def _to_bytes(value: Any) -> bytes:
    """By value: tensors in a queue are handles into the memory of a process that may be gone when they are read."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def run_ranks(
    world_size: int,
    function: Callable[..., Any],
    *arguments: Any,
    tp_degree: int = 1,
    limit_s: float = LIMIT_S,
) -> list[Any]:
    """`function(mesh, *arguments)` on every rank; returns their results in rank order.

    Args:
        tp_degree: ranks that share each layer.

    Raises:
        AssertionError: with the traceback of the first rank that failed, or after `limit_s` seconds.
    """
    context = mp.get_context("spawn")
    results = context.Queue()
    found: dict[int, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        ranks = [
            context.Process(
                target=_rank_main,
                args=(rank, world_size, tp_degree, store, function, arguments, results),
                daemon=True,
            )
            for rank in range(world_size)
        ]
        # Before they start: they import what looks for GPUs.
        with mock.patch.dict(os.environ, CUDA_VISIBLE_DEVICES=""):
            for process in ranks:
                process.start()
        try:
            for _ in ranks:
                rank, value, error = results.get(timeout=limit_s)
                assert error is None, f"rank {rank} failed:\n{error}"
                found[rank] = torch.load(io.BytesIO(value), weights_only=False)
        except queue.Empty:
            raise AssertionError(
                f"ranks still running after {limit_s} s: {sorted(set(range(world_size)) - set(found))}"
            ) from None
        finally:
            for process in ranks:
                process.join(timeout=10 if len(found) == world_size else 0)
                with contextlib.suppress(Exception):
                    process.kill()
    return [found[rank] for rank in range(world_size)]


__all__ = ["Mesh", "run_ranks"]
