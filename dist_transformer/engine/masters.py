"""Where a rank keeps float32 weights and Adam's moments under every ZeRO stage: what checkpoints are made of."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dist_transformer.checkpoints.pieces import Piece
from dist_transformer.checkpoints.reader import KINDS, Kind
from dist_transformer.engine.runs import is_sharded, part_shape, runs
from dist_transformer.parallel.partition import partition_of

if TYPE_CHECKING:
    from dist_transformer.engine.engine import Engine


@dataclass(frozen=True)
class LivePiece:
    """A run of a parameter's elements on this rank, as views of the tensors that the optimizer updates."""

    piece: Piece
    owner: Tensor
    """The optimizer's tensor that the run lies in."""
    offset: int
    """Where in it."""
    replica: int
    n_replicas: int
    """So many ranks hold the same run."""

    def share(self) -> "LivePiece":
        """What this rank saves of it: an equal share of what its replicas hold too."""
        begin, end = (self.piece.length * n // self.n_replicas for n in (self.replica, self.replica + 1))
        piece = replace(self.piece, start=self.piece.start + begin, length=end - begin)
        return LivePiece(piece, self.owner, self.offset + begin, 0, 1)


def live_pieces(engine: "Engine") -> list[LivePiece]:
    """Everything that this rank holds in float32."""
    mesh, pieces = engine.mesh, []
    # Where DeepSpeed shards nothing, data-parallel ranks hold the same.
    dp_copies, dp_copy = (1, 0) if is_sharded(engine.optimizer) else (mesh.dp_size, mesh.dp_rank)
    names = {id(parameter): name for name, parameter in engine.model.named_parameters()}
    for run in runs(engine.optimizer, mesh.dp_rank):
        partition, shape = partition_of(run.parameter), part_shape(run.parameter)
        n_parts = 1 if partition is None else partition.n_parts
        # So do tensor-parallel ranks, where they outnumber a parameter's parts.
        n_alike = mesh.tp_size // n_parts
        replica = dp_copy * n_alike + mesh.tp_rank % n_alike
        piece = Piece(
            names[id(run.parameter)],
            tuple(shape if partition is None else partition.whole_shape(shape)),
            None if partition is None else partition.dim,
            n_parts,
            0 if partition is None else partition.part,
            run.start,
            run.length,
        )
        if run.length:
            pieces.append(LivePiece(piece, run.owner, run.offset, replica, dp_copies * n_alike))
    return pieces


def kinds_of(engine: "Engine") -> tuple[Kind, ...]:
    """What this engine keeps of every element."""
    return KINDS if engine.average is None else (*KINDS, "ema")


def tensor_of(engine: "Engine", live: LivePiece, kind: Kind) -> Tensor | None:
    """The flat view of a piece's elements; None: the optimizer has no such state yet."""
    if kind == "ema":
        found = None if engine.average is None else engine.average.of(live.owner)
    else:
        found = live.owner if kind == "master" else _states(engine).get(live.owner, {}).get(kind)
    if found is None:
        return None
    assert found.dtype == torch.float32
    view: Tensor = found.detach().view(-1)[live.offset : live.offset + live.piece.length]
    return view


def adam_steps(engine: "Engine") -> int:
    """Updates that Adam has made: skipped ones do not count in its bias correction."""
    counts = {int(state["step"]) for state in _states(engine).values() if "step" in state}
    if len(counts) > 1:
        raise RuntimeError(
            f"the optimizer's tensors have made different numbers of updates: {sorted(counts)}"
        )
    return counts.pop() if counts else 0


def set_adam_steps(engine: "Engine", n: int) -> None:
    """Make the optimizer's state complete, with that many updates made; moments that are new are zero."""
    states = _states(engine)
    for group, owner in _owners(engine):
        state = states[owner]
        if "step" not in state:
            device = owner.device if group.get("fused") or group.get("capturable") else torch.device("cpu")
            state["step"] = torch.zeros((), dtype=torch.float32, device=device)
        state["step"].fill_(n)
        for kind in KINDS[1:]:
            if kind not in state:
                state[kind] = torch.zeros_like(owner, requires_grad=False)


def release_whole_parameters(engine: "Engine") -> None:
    """Before masters are written under ZeRO 3: parameters that are whole on every rank become parts again."""
    if hasattr(engine.optimizer, "checkpoint_event_prologue"):
        engine.optimizer.checkpoint_event_prologue()


@torch.no_grad()
def refresh_parameters(engine: "Engine") -> None:
    """Make the model's own weights those of the masters. A collective."""
    optimizer: Any = engine.optimizer
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        groups = zip(
            optimizer.fp32_partitioned_groups_flat, optimizer.fp16_partitioned_groups_flat, strict=True
        )
        for index, (master, low) in enumerate(groups):
            low.copy_(master)
            optimizer._unflatten_partitioned_parameters(index)
        optimizer.checkpoint_event_epilogue()
    elif hasattr(optimizer, "update_lp_params"):
        optimizer.update_lp_params()
    elif hasattr(optimizer, "fp32_groups"):
        for masters, lows in zip(optimizer.fp32_groups, optimizer.fp16_groups, strict=True):
            for master, low in zip(masters, lows, strict=True):
                low.copy_(master)


def _owners(engine: "Engine") -> Iterator[tuple[dict[str, Any], Tensor]]:
    """Every tensor that the optimizer updates, with its group."""
    optimizer: Any = engine.optimizer
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        # Stage 3 fills the optimizer's groups for the time of an update only; they are alike in what matters here.
        group = optimizer.optimizer.param_groups[0]
        yield from ((group, flat) for flat in optimizer.fp32_partitioned_groups_flat)
        return
    for group in optimizer.param_groups:
        yield from ((group, owner) for owner in group["params"])


def _states(engine: "Engine") -> Any:
    """The state of the optimizer inside DeepSpeed's wrapper, by tensor."""
    optimizer: Any = engine.optimizer
    return getattr(optimizer, "optimizer", optimizer).state
