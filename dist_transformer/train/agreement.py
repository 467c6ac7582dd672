"""What all ranks must agree on before an update: one small all-reduce a step."""

from collections.abc import Sequence

import torch

from dist_transformer.data.batch import Batch
from dist_transformer.data.hashing import hash_key
from dist_transformer.errors import DataError, UserError
from dist_transformer.model.flops import Work, executed_work, useful_work
from dist_transformer.parallel.collectives import gather_objects, raise_together, sum_over_ranks
from dist_transformer.parallel.mesh import Mesh
from dist_transformer.train.hooks import StepTotals

_COUNTS = ("n_source_tokens", "n_target_tokens", "n_pairs", "n_truncated", "n_dropped", "n_bad")
_N_WORK = len(Work().as_tuple())


def agree(
    micro_batches: Sequence[Batch], error: UserError | None, wants_stop: bool, wants_save: bool, mesh: Mesh
) -> tuple[StepTotals, bool, bool]:
    """Counts of the global batch, and whether any rank was asked to stop or to save. A collective.

    Args:
        micro_batches: This rank's rows; none where they could not be read.
        error: Why not.
        wants_stop: This rank was asked to stop.
        wants_save: This rank was asked to save.
        mesh: All ranks.

    Raises:
        UserError: on every rank, if any could not read its rows, or if ranks that share rows have different ones.
    """
    counts = _own_counts(micro_batches)
    fingerprint = sum(batch.fingerprint for batch in micro_batches)
    # Ranks that share rows (tensor parallelism) must have read the same ones, or their shards of a layer would work on
    # different samples. The first of each group says tp - 1 times what the others take away once.
    seen = hash_key(*counts, fingerprint) >> 24
    if is_first := mesh.tp_rank == 0:
        seen *= mesh.tp_size - 1
    else:
        seen = -seen
    own = [*counts, fingerprint >> 32, fingerprint & 0xFFFFFFFF]
    flags = [int(wants_stop), int(wants_save), int(error is not None)]
    local = [*(own if is_first else [0] * len(own)), seen, *flags]
    values = torch.tensor(local, dtype=torch.int64, device=mesh.device)
    *counts, high, low, unequal, stop, save, n_failed = sum_over_ranks(values, mesh).tolist()
    if n_failed:
        raise_together(error, mesh)
    if unequal:
        different = DataError(
            "ranks that share a layer (parallel.tp_degree) read different samples: their nodes see different shards, "
            "or with data.on_bad_shard=skip only some of them could read one: give all nodes the same shards"
        )
        different.on_every_rank = True
        raise different
    totals = _totals(counts, ((high << 32) + low) % 2**64)
    if totals.n_bad:
        found = gather_objects([problem for batch in micro_batches for problem in batch.problems], mesh)
        totals.problems = list(dict.fromkeys(problem for problems in found for problem in problems))
    return totals, stop > 0, save > 0


def _own_counts(micro_batches: Sequence[Batch]) -> list[int]:
    """What this rank's share of the step needs, what is executed for it, and what was counted on the way."""
    useful, executed = Work(), Work()
    for batch in micro_batches:
        n_rows, source_len = batch.encoder_segment_ids.shape
        useful += useful_work(batch.encoder_segment_ids, batch.decoder_segment_ids)
        executed += executed_work(n_rows, source_len, batch.decoder_segment_ids.shape[1])
    counts = [sum(getattr(batch, name) for batch in micro_batches) for name in _COUNTS]
    return [*useful.as_tuple(), *executed.as_tuple(), *counts]


def _totals(counts: Sequence[int], fingerprint: int) -> StepTotals:
    useful, executed = Work(*counts[:_N_WORK]), Work(*counts[_N_WORK : 2 * _N_WORK])
    n_source, n_target, n_pairs, n_truncated, n_dropped, n_bad = counts[2 * _N_WORK :]
    return StepTotals(
        n_source, n_target, n_pairs, n_truncated, n_dropped, useful, executed, fingerprint, n_bad
    )
