"""A run does not depend on its layout: first weights, losses and gradient norms of 20 steps; what a rank holds."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from dist_transformer.engine.build import build_part
from dist_transformer.engine.deepspeed_config import build_deepspeed_config
from dist_transformer.engine.engine import Engine
from dist_transformer.engine.memory import StateBytes, state_bytes
from dist_transformer.model import build_model
from dist_transformer.parallel.regions import TensorParallel
from dist_transformer.plan.live_bytes import LiveBytes
from dist_transformer.plan.states import plan_states
from tests.dist.harness import Mesh, run_ranks
from tests.dist.layouts import N_ROWS, PRESETS, Case, Course, compare, config_of, courses
from tests.dist.test_gradients import part, rows_of

# (ranks, tp) and, for each preset, the stages with and without sequence parallelism: each stage and each way thrice.
LAYOUTS: dict[tuple[int, int], list[list[tuple[int, bool]]]] = {
    (2, 2): [[(0, True), (3, False)], [(1, False), (2, True)], [(3, True), (0, False)]],
    (4, 2): [[(1, True), (3, True)], [(0, True), (3, False)], [(2, True), (1, False)]],
    (4, 4): [[(2, False)], [(3, True)], [(0, True)]],
}


MODERN = "modern_small"
MORE = [
    Case(MODERN, 2, offload="optimizer", micro_steps=2, n_steps=5),
    Case(MODERN, 3, offload="all", n_steps=5),
    Case(MODERN, 3, recompute="selective", micro_steps=2, n_steps=5),
    Case("vaswani2017_base", 3, recompute="selective", n_steps=5),
    Case(MODERN, 1, recompute="full", sequence_parallel=False, n_steps=5),
]
BF16 = [
    *(Case(MODERN, stage, precision="bf16", n_steps=8) for stage in (0, 1, 2, 3)),
    *(
        Case(MODERN, stage, precision="bf16", grad_accum_dtype="fp32", micro_steps=2, n_steps=8)
        for stage in (1, 2, 3)
    ),
]
SCALED = [
    Case("t5_v1_1_small", stage, optimizer="adamw_rms", n_steps=5, precision=precision)
    for stage, precision in [(0, "fp32"), (1, "fp32"), (3, "fp32"), (0, "bf16"), (2, "bf16")]
]


def cases_of(ranks: int, tp_degree: int) -> list[Case]:
    """What runs for twenty steps there."""
    return [
        Case(preset, zero_stage=stage, sequence_parallel=sequence)
        for preset, layouts in zip(PRESETS, LAYOUTS[ranks, tp_degree], strict=True)
        for stage, sequence in layouts
    ]


WIDE = (
    ("d_model", 64),
    ("d_ff", 256),
    ("n_heads", 4),
    ("n_kv_heads", 4),
    ("head_dim", 16),
    ("vocab_size", 2048),
)


def held(mesh: Mesh) -> list[tuple[int, StateBytes, int, float]]:
    """(stage, counted states, all that is alive, by formula) in bf16, before an update.

    Stages 0 and 1 after the first of two micro-steps, when they hold whole gradients; 2 and 3 after the last one.
    """
    found = []
    for stage in (0, 1, 2, 3):
        # Buffers for communication are small, so that what is alive are the states.
        tuned = {"reduce_bucket_size": 500, "allgather_bucket_size": 500}
        if stage == 3:
            tuned |= {"stage3_prefetch_bucket_size": 500, "stage3_param_persistence_threshold": 10}
        settings = {"zero_optimization": tuned} if stage else {}
        case = Case("modern_small", stage, precision="bf16", micro_steps=2, model=WIDE, deepspeed=settings)
        rows = rows_of(packed=False)
        size = N_ROWS // (2 * mesh.dp_size)
        batches = [
            part(rows, (2 * mesh.dp_rank + i) * size, (2 * mesh.dp_rank + i + 1) * size) for i in (0, 1)
        ]
        with LiveBytes("cpu", grain=1) as live:
            engine = Engine(config_of(case, mesh), mesh)
            engine.train_step(batches, 50, 1)
            engine.set_learning_rate(2)
            looks: list[tuple[StateBytes, int]] = []
            step = engine.deepspeed.step
            engine.deepspeed.step = lambda: (looks.append((state_bytes(engine), live.settled())), step())  # noqa: B023
            engine.accumulate(batches, 50)
            engine.deepspeed.step = step
            looks.append((state_bytes(engine), live.settled()))
        counted, alive = looks[0 if stage < 2 else 1]
        plan = plan_states(engine.config, engine.n_parameters // mesh.tp_size, 0, mesh.dp_size)
        found.append((stage, counted, alive, plan.weights + plan.gradients + plan.optimizer))
    return found


def build_peak(mesh: Mesh) -> list[tuple[float, float]]:
    """(most bytes alive while a rank's part is built, its share and the largest parameter) for each stage."""
    found = []
    for stage in (0, 3):
        case = Case("t5_v1_1_small", stage, model=(*WIDE, ("n_encoder_layers", 6), ("n_decoder_layers", 6)))
        config = config_of(case, mesh)
        sizes = [parameter.numel() for parameter in build_model(config.model).parameters()]
        share = sum(sizes) / (mesh.tp_size * (mesh.dp_size if stage == 3 else 1))
        with LiveBytes("cpu", grain=1) as live:
            settings = build_deepspeed_config(config, mesh.dp_size)
            model = build_part(config, mesh, TensorParallel.of(mesh, True), settings)
            assert all(not parameter.is_meta for parameter in model.parameters())
        found.append((float(live.peak), 4 * (share + 2.5 * max(sizes))))
    return found


def uses_the_whole(mesh: Mesh) -> torch.Tensor:
    """First scores of a decoding that no other rank takes part in."""
    case = Case("vaswani2017_base", 3 if mesh.world_size > 1 else 0)
    engine = Engine(config_of(case, mesh), mesh)
    with engine.whole_model() as model:
        sources = rows_of(packed=False).encoder_input_tokens
        cache = model.start(sources)
        first = torch.zeros(len(sources), 1, dtype=torch.int64)
        return model.step(first, cache).detach()


Job = tuple[Callable[..., Any], tuple[Any, ...]]


def jobs_of(ranks: int, tp_degree: int) -> dict[str, Job]:
    """All that is asked of these ranks: starting them costs most."""
    jobs: dict[str, Job] = {}
    if ranks == 1:
        jobs["steps"] = courses, ([Case(preset) for preset in PRESETS],)
        jobs["scaled"] = courses, (SCALED[:1],)
    if (ranks, tp_degree) in LAYOUTS:
        jobs["steps"] = courses, (cases_of(ranks, tp_degree),)
    if (ranks, tp_degree) == (2, 2):
        jobs["more"], jobs["bf16"] = (courses, (MORE,)), (courses, (BF16,))
    if (ranks, tp_degree) == (4, 2):
        jobs["scaled"], jobs["build"], jobs["held"] = (courses, (SCALED,)), (build_peak, ()), (held, ())
    if (ranks, tp_degree) in {(1, 1), (4, 2)}:
        jobs["decode"] = uses_the_whole, ()
    return jobs


def run_jobs(mesh: Mesh, jobs: dict[str, Job]) -> dict[str, Any]:
    return {name: job(mesh, *arguments) for name, (job, arguments) in jobs.items()}


@functools.cache
def found(ranks: int, tp_degree: int) -> list[dict[str, Any]]:
    """Each rank's results, by name."""
    return run_ranks(ranks, run_jobs, jobs_of(ranks, tp_degree), tp_degree=tp_degree, limit_s=280)


def alone() -> dict[str, Course]:
    """Each preset on one rank without ZeRO."""
    return dict(zip(PRESETS, found(1, 1)[0]["steps"], strict=True))


@pytest.mark.parametrize(("ranks", "tp_degree"), LAYOUTS)
def test_twenty_steps_are_the_same(ranks: int, tp_degree: int) -> None:
    expected = alone()
    assert found(ranks, tp_degree)[0]["steps"][0].initial
    for rank in found(ranks, tp_degree):
        for case, mine in zip(cases_of(ranks, tp_degree), rank["steps"], strict=True):
            compare(mine, expected[case.preset], case)


def test_micro_steps_recomputation_and_offloading_change_nothing() -> None:
    for case, mine in zip(MORE, found(2, 2)[1]["more"], strict=True):
        compare(mine, alone()[case.preset], case)


def test_bf16_follows_fp32() -> None:
    """The norm too: in stage 0 and 1 to 3 other functions of DeepSpeed's add it over ranks."""
    expected = alone()[MODERN]
    for case, mine in zip(BF16, found(2, 2)[1]["bf16"], strict=True):
        assert mine.losses == pytest.approx(expected.losses[:8], rel=2e-2), case
        assert mine.norms == pytest.approx(expected.norms[:8], rel=5e-2), case


def test_steps_scaled_to_each_parameter() -> None:
    """RMS-scaled AdamW: the root mean square is the whole parameter's, wherever its parts are."""
    [expected] = found(1, 1)[0]["scaled"]
    for case, mine in zip(SCALED, found(4, 2)[3]["scaled"], strict=True):
        relative = 1e-5 if case.precision == "fp32" else 1e-2
        assert mine.losses == pytest.approx(expected.losses, rel=relative), case


def test_a_rank_holds_what_the_formulas_say() -> None:
    """With N = 2 and tp = 2."""
    for rank in found(4, 2):
        for stage, counted, alive, expected in rank["held"]:
            assert counted.total == pytest.approx(expected, rel=0.05), (stage, counted)
            # Nothing else is alive that would be missing in the count.
            assert counted.total <= alive < 1.05 * expected, (stage, counted, alive)


def test_no_rank_ever_holds_the_whole_model() -> None:
    """While it is built: a rank's share, and one parameter (whole, and its part on the way to where it stays)."""
    for rank in found(4, 2):
        for peak, allowed in rank["build"]:
            assert peak < allowed


def test_decoding_needs_no_other_rank() -> None:
    expected = found(1, 1)[0]["decode"]
    for rank in found(4, 2):
        torch.testing.assert_close(rank["decode"], expected, rtol=0, atol=0)
