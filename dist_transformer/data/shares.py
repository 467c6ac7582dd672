"""One of several machines' share of a preparation: which inputs, how many shards, how much held-out text."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from pathlib import Path

from dist_transformer.data.inputs import Input
from dist_transformer.data.order import LANE_COUNTS
from dist_transformer.errors import DataError

SHARD_BYTES = 64 << 20
"""Size of a shard's tokens that the default number of shards aims at."""
MIN_SHARDS, ENOUGH_SHARDS, MIN_SAMPLES_PER_SHARD = 24, 96, 8
_UNPACKED = 3
"""Text usually unpacks to about so many times its bytes."""
_TEXT_PER_TOKEN_BYTES = 2
"""Bytes of text for a byte of tokens: about four a token, of two bytes."""


@dataclass(frozen=True)
class Share:
    """Task `task` of `n_tasks`; the only one of one does everything."""

    task: int = 0
    n_tasks: int = 1
    inputs: str = ""
    """Identity of the inputs of all tasks together."""
    n_shards: int | None = None
    """Default number of training shards of all tasks together; None: by what one task finds."""

    @property
    def is_all(self) -> bool:
        """Whether there is nothing to merge."""
        return self.n_tasks == 1 and not self.inputs

    def arguments(self) -> dict[str, int]:
        """What it adds to the arguments of a preparation."""
        return {} if self.is_all else {"task": self.task, "tasks": self.n_tasks}

    def of(self, total: int) -> int:
        """This task's part of a number; those of all tasks add up to it."""
        return total * (self.task + 1) // self.n_tasks - total * self.task // self.n_tasks


def share_inputs(
    inputs: Sequence[Input], held: Sequence[Input], task: int, n_tasks: int
) -> tuple[Share, list[Input]]:
    """Deal inputs to tasks so that all get about as many bytes; every task computes the same.

    The largest input goes first, each to the task that has least so far. A task keeps the order of its inputs.

    Raises:
        DataError: there is no such task, or there are more tasks than inputs.
    """
    if not 0 <= task < n_tasks:
        raise DataError(
            f"task {task} of {n_tasks}: tasks are counted from 0; a part of an array that is run again needs "
            "--tasks with the number of the whole array"
        )
    if n_tasks > len(inputs):
        raise DataError(
            f"{n_tasks} tasks are more than the {len(inputs)} inputs: use {len(inputs)} tasks or fewer, or "
            "split the files"
        )
    sizes = [input_bytes(source) for source in inputs]
    dealt: list[list[int]] = [[] for _ in range(n_tasks)]
    loads = [(0, 0, i) for i in range(n_tasks)]
    for number in sorted(range(len(inputs)), key=lambda i: (-sizes[i], i)):
        n_bytes, n_inputs, owner = heappop(loads)
        dealt[owner].append(number)
        heappush(loads, (n_bytes + sizes[number], n_inputs + 1, owner))
    listing = [[*source.files, _sizes(source)] for source in (*inputs, *held)]
    identity = hashlib.sha256(json.dumps(listing).encode()).hexdigest()
    n_shards = default_array_shards(sum(sizes), n_tasks)
    return Share(task, n_tasks, identity, n_shards), [inputs[i] for i in sorted(dealt[task])]


def _sizes(source: Input) -> list[int]:
    return [Path(name).stat().st_size for name in source.files]


def input_bytes(source: Input) -> int:
    """About so many bytes of text."""
    return sum(_sizes(source)) * (_UNPACKED if source.is_compressed else 1)


def default_array_shards(n_bytes: int, n_tasks: int) -> int:
    """A number of shards with many divisors for so much text: about 64 MB each, and one for each task at least."""
    wanted = max(ENOUGH_SHARDS, n_tasks, n_bytes // (_TEXT_PER_TOKEN_BYTES * SHARD_BYTES))
    return next((count for count in LANE_COUNTS if count >= wanted), wanted)


def default_shards(n_bytes: int, n_documents: int, n_samples: int) -> int:
    """A number of shards with many divisors: about 64 MB each, at least 24, and 96 where there are samples for it.

    At least 8 samples in each; of a few long documents (books) that are split, 2 are enough for a shard.
    """
    # 96 serve 16 GPUs with 2 loader workers each; shards of under 1,000 samples would pack less well.
    by_samples = min(ENOUGH_SHARDS, n_samples // 1000)
    wanted = max(MIN_SHARDS, by_samples, -(-n_bytes // SHARD_BYTES))
    fitting = [
        count
        for count in LANE_COUNTS
        if count == 1 or (count * MIN_SAMPLES_PER_SHARD <= n_samples and count * 2 <= n_documents)
    ]
    return next((count for count in fitting if count >= wanted), fitting[-1])
