"""Random generators of a rank: kept in a checkpoint, given back in the same layout, seeded anew in another."""

import hashlib
import json
import random

import numpy as np
import torch
from torch import Tensor

from dist_transformer.parallel.mesh import Mesh

_PREFIX = "random."


def random_tensors(mesh: Mesh) -> dict[str, Tensor]:
    """The states of torch's generators, for the rank's file."""
    states = {"cpu": torch.get_rng_state()}
    if mesh.device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(mesh.device)
    return {_PREFIX + name: state for name, state in states.items()}


def random_metadata() -> dict[str, str]:
    """The states of Python's and numpy's generators, for the header of the rank's file."""
    kind, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    return {
        "python": json.dumps(random.getstate()),
        "numpy": json.dumps([kind, np.asarray(keys).tolist(), int(position), int(has_gauss), float(gauss)]),
    }


def set_random_state(tensors: dict[str, Tensor], metadata: dict[str, str], mesh: Mesh) -> None:
    """Give back what `random_tensors` and `random_metadata` took.

    Raises:
        KeyError, ValueError, TypeError, RuntimeError: they are not states.
    """
    torch.set_rng_state(tensors[_PREFIX + "cpu"])
    if mesh.device.type == "cuda":
        torch.cuda.set_rng_state(tensors[_PREFIX + "cuda"], mesh.device)
    version, keys, gauss = json.loads(metadata["python"])
    random.setstate((version, tuple(keys), gauss))
    kind, numbers, *rest = json.loads(metadata["numpy"])
    np.random.set_state((kind, np.array(numbers, dtype=np.uint32), *rest))


def random_names(mesh: Mesh) -> list[str]:
    """What `random_tensors` calls the states."""
    return [_PREFIX + "cpu", *([_PREFIX + "cuda"] if mesh.device.type == "cuda" else [])]


def seed_after_resume(seed: int, step: int, mesh: Mesh, sequence_parallel: bool) -> None:
    """Seed this rank's generators for the steps after `step`, where those of the checkpoint are another layout's.

    As at the start of a run, ranks draw alike only where they hold the same rows and positions.
    """
    rank = mesh.rank if sequence_parallel else mesh.dp_rank
    digest = hashlib.sha256(f"resumed/{seed}/{step}/{rank}".encode()).digest()
    number = int.from_bytes(digest[:8], "little") >> 1
    torch.manual_seed(number)
    random.seed(number)
    np.random.seed(number % 2**32)
