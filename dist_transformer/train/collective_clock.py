"""How long this rank waits in collectives, ours and DeepSpeed's alike."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist

from dist_transformer.tracking.accounts import TimeAccounts


@contextlib.contextmanager
def time_collectives(accounts: TimeAccounts) -> Iterator[None]:
    """Put waiting for collectives inside steps on the account `communication`.

    Every blocking collective of torch ends in `Work.wait`, so that this one place sees them all. With gloo it is the
    time of the transfer and of waiting for slower ranks; with NCCL it returns at once, because the stream waits.
    """
    if not dist.is_available():
        yield
        return
    work: Any = dist.Work
    original = work.wait

    def wait(self: Any, *arguments: Any, **keywords: Any) -> Any:
        with accounts.spend("communication", only_in="compute"):
            return original(self, *arguments, **keywords)

    work.wait = wait
    try:
        yield
    finally:
        work.wait = original
