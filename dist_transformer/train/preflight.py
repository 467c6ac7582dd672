"""Before step 1: is every node fit? Devices, versions, disk, clock, a shard read, a product of matrices, an all-reduce.

A bad node found here costs seconds; found at the first collective it costs the timeout, and nobody is named. The ones
at fault are written to `RUN_DIR/excluded_nodes`, one a line, which the batch script gives to Slurm when it requeues.
"""

import importlib.metadata
import platform
import shutil
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from dist_transformer import __version__
from dist_transformer.config import Config
from dist_transformer.errors import PreflightError
from dist_transformer.parallel.collectives import gather_objects, raise_together
from dist_transformer.parallel.mesh import Mesh
from dist_transformer.tracking.heartbeats import node_name

EXCLUDED_NAME = "excluded_nodes"
_PACKAGES = ("torch", "deepspeed", "numpy", "tokenizers", "webdataset")
_CLOCK_SKEW_S = 5.0
_PRODUCT_SIZE = 512
_REDUCED_ELEMENTS = 1 << 20
_LEAST_FREE_GIB = 1.0


@dataclass(frozen=True)
class Facts:
    """What one rank found about its place."""

    rank: int
    host: str
    device: str
    versions: dict[str, str]
    """Of what must be the same everywhere: packages, Python, kind of device."""
    clock: float
    """Seconds since 1970, read right after a barrier: all ranks read it at the same time."""
    free_gib: float
    """On the file system of the run directory."""
    product_s: float
    """A product of matrices on the device."""
    read_s: float
    """The first bytes of a training shard."""
    reduce_s: float
    """One all-reduce of 4 MiB over all ranks, after one that is not counted."""
    problem: str
    """What failed here, in a sentence; empty: nothing."""


def run_preflight(config: Config, mesh: Mesh) -> list[Facts]:
    """Look at every rank's place. A collective; takes about a second.

    Returns:
        The facts of all ranks, on every rank.

    Raises:
        PreflightError: on every rank, naming each unfit node.
    """
    product_s, read_s, problem = 0.0, 0.0, ""
    run_dir = Path(config.run.dir)
    try:
        product_s = _time_product(mesh.device)
        read_s = _time_read(config)
    except (OSError, RuntimeError) as failure:
        problem = str(failure).splitlines()[0] or type(failure).__name__
    reduce_s = _time_all_reduce(mesh)
    facts = Facts(
        rank=mesh.rank,
        host=node_name(),
        device=_device_name(mesh.device),
        versions=_versions() | {"the device": _device_name(mesh.device)},
        clock=time.time(),
        free_gib=shutil.disk_usage(run_dir).free / 2**30,
        product_s=product_s,
        read_s=read_s,
        reduce_s=reduce_s,
        problem=problem,
    )
    everyone: list[Facts] = gather_objects(facts, mesh)
    problems = find_problems(everyone)
    error: PreflightError | None = None
    if problems:
        # What is wrong everywhere is no node's fault.
        if mesh.is_rank_zero and len(problems) < len({facts.host for facts in everyone}):
            exclude_nodes(run_dir, sorted(problems))
        listing = "; ".join(f"{host}: {what}" for host, what in sorted(problems.items()))
        error = PreflightError(f"not every node is fit to train: {listing}")
    raise_together(error, mesh)
    return everyone


def find_problems(everyone: Sequence[Facts]) -> dict[str, str]:
    """What is wrong, by host. Where hosts differ, those that differ from most are at fault."""
    problems: dict[str, str] = {}
    for facts in everyone:
        if facts.problem:
            problems[facts.host] = facts.problem
        elif facts.free_gib < _LEAST_FREE_GIB:
            problems[facts.host] = f"only {facts.free_gib:.2f} GiB are free for the run directory"
    for name in everyone[0].versions:
        usual, _ = Counter(facts.versions[name] for facts in everyone).most_common(1)[0]
        for facts in everyone:
            if facts.versions[name] != usual:
                problems.setdefault(facts.host, f"{name} is {facts.versions[name]}, elsewhere {usual}")
    clocks = sorted(facts.clock for facts in everyone)
    middle = clocks[len(clocks) // 2]
    for facts in everyone:
        if abs(facts.clock - middle) > _CLOCK_SKEW_S:
            problems.setdefault(facts.host, f"its clock is off by {facts.clock - middle:+.0f} s")
    return problems


def describe_facts(everyone: Sequence[Facts]) -> list[str]:
    """The table for people: a line for each host."""
    middle = sorted(facts.clock for facts in everyone)[len(everyone) // 2]
    lines = [
        "node                 ranks  device                    matmul   read  all-reduce  free disk   clock"
    ]
    for first in _by_host(everyone):
        here = [facts for facts in everyone if facts.host == first.host]
        slowest = {
            name: max(getattr(facts, name) for facts in here) for name in ("product_s", "read_s", "reduce_s")
        }
        lines.append(
            f"{first.host:<20} {len(here):>5}  {first.device[:24]:<24} {1e3 * slowest['product_s']:>5.1f} ms "
            f"{1e3 * slowest['read_s']:>3.0f} ms {1e3 * slowest['reduce_s']:>8.1f} ms {first.free_gib:>6.0f} GiB "
            f"{first.clock - middle:>+5.1f} s"
        )
    return lines


def exclude_nodes(run_dir: Path, hosts: Sequence[str]) -> None:
    """Add hosts to `excluded_nodes`."""
    path = run_dir / EXCLUDED_NAME
    known = path.read_text(encoding="utf-8").split() if path.exists() else []
    path.write_text(
        "\n".join([*known, *(host for host in hosts if host not in known)]) + "\n", encoding="utf-8"
    )


def _by_host(everyone: Sequence[Facts]) -> list[Facts]:
    """The first rank of each host."""
    first: dict[str, Facts] = {}
    for facts in everyone:
        first.setdefault(facts.host, facts)
    return list(first.values())


def _versions() -> dict[str, str]:
    found = {name: importlib.metadata.version(name) for name in _PACKAGES}
    return found | {"dist_transformer": __version__, "python": platform.python_version()}


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return "CPU"


def _time_product(device: torch.device) -> float:
    """A product that is checked: a broken device is worse than a slow one.

    Raises:
        RuntimeError: the device fails, or its result is wrong.
    """
    ones = torch.ones(_PRODUCT_SIZE, _PRODUCT_SIZE, device=device)
    for _ in range(2):
        start = time.perf_counter()
        total = float((ones @ ones).sum())
        seconds = time.perf_counter() - start
    if total != _PRODUCT_SIZE**3:
        raise RuntimeError(
            f"{device} computes wrongly: a sum is {total:g} and should be {_PRODUCT_SIZE**3:g}"
        )
    return seconds


def _time_read(config: Config) -> float:
    """The first shard of the first corpus, where it is a folder that this node sees; 0 elsewhere."""
    shard = next(iter(sorted(Path(config.data.corpora()[0].train).glob("*.tar"))), None)
    if shard is None:
        return 0.0
    start = time.perf_counter()
    with shard.open("rb") as file:
        file.read(1 << 20)
    return time.perf_counter() - start


def _time_all_reduce(mesh: Mesh) -> float:
    values = torch.ones(_REDUCED_ELEMENTS, device=mesh.device)
    seconds = 0.0
    for _ in range(2):
        dist.barrier()
        start = time.perf_counter()
        dist.all_reduce(values)
        if mesh.device.type == "cuda":
            torch.cuda.synchronize(mesh.device)
        seconds = time.perf_counter() - start
    dist.barrier()
    return seconds
