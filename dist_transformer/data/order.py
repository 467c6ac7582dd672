"""The order of a run: lanes, and which shard each lane reads when. Pure functions of small integers.

A run's rows come from L lanes in turn: row n is the next row of lane n mod L. L depends on the shards alone,
so the order of rows is the same for every number of ranks and loader workers that divides L.
"""

from collections.abc import Mapping

from dist_transformer.data.hashing import hash_key, permutation
from dist_transformer.errors import DataError

# Different purposes draw from different keys.
_SHARDS, _WINDOW, _ROWS, _NOISE, _CORPUS, MIXTURE = range(1, 7)

RUN_WINDOW_TOKENS = 64 << 20
"""Tokens in the windows of all lanes of a run together, at most: one rank may hold all lanes of a thousand shards."""
SMALLEST_WINDOW = 16
"""Samples in a window, at least: fewer would neither shuffle nor pack."""

LANE_COUNTS = (
    *(1, 2, 4, 6, 8, 12, 16, 24, 36, 48, 60, 72, 96, 120, 180, 240, 360, 480),
    *(720, 960, 1440, 1920, 2880, 3840, 5760, 7680, 15360, 30720),
)
"""Numbers with many divisors, and among them powers of two, which is what clusters are made of.

Strictly highly composite numbers (.., 840, 1680, 2520, 5040) would serve any run of up to 10 ranks, but none
of them is a multiple of 32, so that 64 GPUs could not divide them.
"""


def count_lanes(n_shards: int) -> int:
    """Number of lanes for so many shards: as many as shards where that number divides well, else fewer.

    "Well" means divisible by 4 and without a prime factor above 13; other counts (403 shards) take the next
    lower entry of `LANE_COUNTS` and lanes get one shard more or less than each other.
    """
    if n_shards % 4 == 0 and _is_smooth(n_shards):
        return n_shards
    return max(count for count in LANE_COUNTS if count <= n_shards)


def _is_smooth(number: int) -> bool:
    for prime in (2, 3, 5, 7, 11, 13):
        while number % prime == 0:
            number //= prime
    return number == 1


def check_lanes(n_shards: Mapping[str, int], dp_size: int, workers: int) -> int:
    """The number of lanes, or a `DataError` whose fixes are ones that work.

    All corpora of a run share the lanes, so the one with the fewest shards decides their number.

    Args:
        n_shards: Shards of the train split of each corpus by name; where there is only one, it is not named.
        dp_size: Data-parallel ranks.
        workers: Loader processes per rank; 0 counts as 1.
    """
    smallest = min(n_shards, key=lambda name: n_shards[name])
    fewest, per_rank = n_shards[smallest], max(1, workers)
    n_lanes, needed = count_lanes(fewest), dp_size * per_rank
    if n_lanes % needed == 0:
        return n_lanes
    several = len(n_shards) > 1
    fixes = []
    if shards := _shards_for(needed, fewest):
        short = [name for name, n in n_shards.items() if n < shards] if several else []
        fixes.append(f"prepare {' and '.join(short)}{' ' if short else ''}with --shards {shards}")
    if fewer := next((w for w in range(per_rank - 1, 0, -1) if n_lanes % (dp_size * w) == 0), 0):
        fixes.append(f"set data.workers={fewer}")
    else:
        ranks = next(r for r in range(min(dp_size, n_lanes), 0, -1) if n_lanes % r == 0)
        with_workers = next(w for w in range(per_rank, 0, -1) if n_lanes % (ranks * w) == 0)
        fixes.append(f"use {_plural(ranks, 'rank')} x {_plural(with_workers, 'worker')}")
    shards_given = _plural(fewest, "shard")
    whose = f"the {shards_given} of corpus {smallest}" if several else f"these {shards_given}"
    raise DataError(
        f"{_plural(dp_size, 'rank')} x {_plural(per_rank, 'worker')} need a multiple of {needed} lanes; "
        f"{whose} give {n_lanes}: {' or '.join(fixes)}"
    )


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _shards_for(needed: int, at_least: int) -> int:
    """The smallest number of shards, not below the present one, whose lanes are a multiple of `needed`; 0:
    none.
    """
    first = max(1, -(-at_least // needed)) * needed
    return next((n for n in range(first, first + 64 * needed, needed) if count_lanes(n) % needed == 0), 0)


def lane_shards(n_shards: int, n_lanes: int, lane: int, seed: int, epoch: int, shuffle: bool) -> list[int]:
    """The shards that a lane reads in an epoch, in order: each shard is in exactly one lane's list."""
    if not shuffle:
        return list(range(lane, n_shards, n_lanes))
    return [int(shard) for shard in permutation(n_shards, seed, _SHARDS, epoch)[lane::n_lanes]]


def window_samples(n_samples: int, n_tokens: int, window: int, window_tokens: int, n_readers: int) -> int:
    """Samples in a window of a corpus, from its manifest and the configuration alone.

    Args:
        n_samples: Of the split.
        n_tokens: Of the split, both sides.
        window: `data.window`, samples at most.
        window_tokens: `data.window_tokens`, tokens at most.
        n_readers: Lanes times corpora of the run: so many windows exist at the same time.
    """
    budget = min(window_tokens, RUN_WINDOW_TOKENS // n_readers)
    return min(window, max(SMALLEST_WINDOW, budget * n_samples // n_tokens)) if n_tokens else window


def corpus_seed(seed: int, corpus: int) -> int:
    """Seed of the order and noise of a corpus: equal shards in two corpora are read differently."""
    return seed if corpus == 0 else hash_key(seed, _CORPUS, corpus)


def window_key(seed: int, epoch: int, shard: int, window: int) -> int:
    """Key of the permutation of a window's samples."""
    return hash_key(seed, _WINDOW, epoch, shard, window)


def row_key(seed: int, epoch: int, shard: int, window: int) -> int:
    """Key of the permutation of a window's packed rows."""
    return hash_key(seed, _ROWS, epoch, shard, window)


def noise_key(seed: int, epoch: int, shard: int) -> int:
    """Key under which each sample of a shard has its own noise."""
    return hash_key(seed, _NOISE, epoch, shard)


def count_windows(n_samples: int, window: int) -> int:
    """Windows of a shard; the last may be shorter."""
    return -(-n_samples // window)
