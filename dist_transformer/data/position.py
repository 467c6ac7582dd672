"""The position of a run in its data, as a checkpoint keeps it: plain JSON that any number of ranks resumes from."""

import json
from collections.abc import Iterator, Mapping, Sequence
from operator import itemgetter
from typing import Any

from dist_transformer.data.cursor import Cursor, as_numbers
from dist_transformer.data.mixture import UNIT
from dist_transformer.data.plan import Corpus, RunPlan
from dist_transformer.errors import DataError

STATE_FORMAT = 2
_IDENTITY = ("seed", "n_lanes", "shares", "corpora")


def describe_run(plan: RunPlan, corpora: Sequence[Corpus], seed: int) -> dict[str, Any]:
    """What decides a run's rows: a resume must find the same, except for the names."""
    described = {
        "seed": seed,
        "n_lanes": plan.n_lanes,
        "shares": list(plan.mixture.shares),
        "corpora": [
            {
                "name": corpus.name,
                "section": corpus.section,
                "folder": corpus.config.train,
                "shards": corpus.manifest.fingerprint(),
                "options": corpus_plan.order_options(),
            }
            for corpus, corpus_plan in zip(corpora, plan.corpora, strict=True)
        ],
    }
    # As a checkpoint gives it back: tuples become lists.
    as_json: dict[str, Any] = json.loads(json.dumps(described))
    return as_json


def part_of_state(
    identity: Mapping[str, Any], *, cursors: Mapping[tuple[int, int], Cursor], **values: Any
) -> dict[str, Any]:
    """One rank's part.

    Args:
        identity: From `describe_run`.
        cursors: Of its (corpus, lane).
        values: dp_rank, dp_size, first_row, n_advanced (rows of this rank behind it), counts and counts_before.
    """
    return {"format": STATE_FORMAT, **identity, **values, "cursors": _to_json(cursors)}


def merge_states(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The run's position from the parts of all ranks; what `TrainStream` resumes from under any layout.

    Ranks that share rows (tensor parallelism) may all be given.

    Returns:
        `format`, what `describe_run` gives, `rows` consumed by all ranks, `counts`, and `cursors`: corpus to lane
        to [epoch, shard, window, row].

    Raises:
        DataError: parts are missing, or do not belong together.
    """
    for state in states:
        _check_format(state)
    parts = {state["dp_rank"]: state for state in states}
    first = states[0]
    same = (*_IDENTITY, "dp_size", "first_row", "n_advanced", "counts_before")
    for state in states:
        if differing := [key for key in same if state[key] != first[key]]:
            raise DataError(
                f"the ranks' data positions do not belong together: they differ in {', '.join(differing)}"
            )
    if missing := sorted(set(range(first["dp_size"])) - set(parts)):
        raise DataError(
            f"the data positions of data-parallel ranks {missing} of {first['dp_size']} are missing"
        )
    counts = {
        name: n + sum(part["counts"][name] for part in parts.values())
        for name, n in first["counts_before"].items()
    }
    cursors = {place: cursor for part in parts.values() for place, cursor in cursors_of(part).items()}
    return {
        "format": STATE_FORMAT,
        **{key: first[key] for key in _IDENTITY},
        "rows": first["first_row"] + first["n_advanced"] * first["dp_size"],
        "counts": counts,
        "cursors": _to_json(cursors),
    }


def cursors_of(state: Mapping[str, Any]) -> dict[tuple[int, int], Cursor]:
    """Where each (corpus, lane) of a state stands."""
    return {
        (int(corpus), int(lane)): Cursor(*cursor)
        for corpus, lanes in state["cursors"].items()
        for lane, cursor in lanes.items()
    }


def check_state(state: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
    """Refuse a position that does not belong to a run.

    Args:
        state: From `merge_states`, as a checkpoint kept it.
        identity: The run's, from `describe_run`.

    Raises:
        DataError: one sentence that names the first difference and the fix.
    """
    _check_format(state)
    was, now = state["corpora"], identity["corpora"]
    if len(was) != len(now):
        raise DataError(
            f"the run was trained on {_names(was)}, and this configuration has {_names(now)}: set data back as it "
            "was, or start a new run (train.init_from keeps the weights)"
        )
    for before, after in zip(was, now, strict=True):
        if before["shards"] != after["shards"]:
            raise DataError(
                f"the shards in {after['folder']} are not the ones this run was trained on ({before['folder']}): give "
                f"{after['section']}.train the folder it began with, or start a new run in another run.dir"
            )
    if changed := list(_changes(state, identity)):
        raise DataError(
            f"the order of data changed ({', '.join(changed)}), so rows already seen cannot be told from new ones: "
            "set it back, or start a new run (train.init_from keeps the weights)"
        )
    if any(
        before["options"].get("packer") != after["options"]["packer"]
        for before, after in zip(was, now, strict=True)
    ):
        raise DataError(
            "the version that wrote the checkpoint packed samples into other rows: resume with it, or start a new run "
            "(train.init_from keeps the weights)"
        )
    if state["n_lanes"] != identity["n_lanes"]:
        raise DataError(
            f"the run was trained with {state['n_lanes']} lanes, this version gives {identity['n_lanes']}: resume it "
            "with the version that wrote the checkpoint"
        )


def _changes(state: Mapping[str, Any], identity: Mapping[str, Any]) -> Iterator[str]:
    several = len(identity["corpora"]) > 1
    if state["seed"] != identity["seed"]:
        yield f"seed was {state['seed']} and is {identity['seed']}"
    for i, (before, after) in enumerate(zip(state["corpora"], identity["corpora"], strict=True)):
        of = f" of {after['name']}" if several else ""
        for name in dict.fromkeys([*after["options"], *before["options"]]):
            was, value = before["options"].get(name), after["options"].get(name)
            if name != "packer" and value != was:
                yield f"{name}{of} was {was} and is {value}"
        shares = state["shares"][i], identity["shares"][i]
        if shares[0] != shares[1]:
            yield f"the share{of} was {100 * shares[0] / UNIT:.4g} % of the rows and is {100 * shares[1] / UNIT:.4g} %"


def _names(corpora: Sequence[Mapping[str, Any]]) -> str:
    names = ", ".join(corpus["name"] for corpus in corpora)
    return f"{len(corpora)} corpora ({names})" if len(corpora) > 1 else f"one corpus ({names})"


def _to_json(cursors: Mapping[tuple[int, int], Cursor]) -> dict[str, dict[str, list[int]]]:
    found: dict[str, dict[str, list[int]]] = {}
    for (corpus, lane), cursor in sorted(cursors.items(), key=itemgetter(0)):
        found.setdefault(str(corpus), {})[str(lane)] = list(as_numbers(cursor))
    return found


def _check_format(state: Mapping[str, Any]) -> None:
    if state.get("format") != STATE_FORMAT:
        raise DataError(
            f"the checkpoint's data position has format {state.get('format')}, this version reads {STATE_FORMAT}: "
            "resume with the version that wrote it"
        )
