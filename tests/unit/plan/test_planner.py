"""Plans of whole layouts: what fits, what is faster, what cannot be; and how they are told."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from dist_transformer.config import Config, build_config
from dist_transformer.errors import ConfigError
from dist_transformer.plan.devices import GPUS, Rates, find_gpu
from dist_transformer.plan.planner import GIB, Plan, Planner, known_vocabulary
from dist_transformer.plan.report import as_json, describe, duration, table
from dist_transformer.plan.search import _worth_it, check_batch, layout_of, search
from dist_transformer.plan.speed import Cluster


def config_of(*overrides: str, **sections: Any) -> Config:
    tree: dict[str, Any] = {
        "run": {"dir": "unused"},
        "model": {
            "preset": "t5_v1_1_small",
            "vocab_size": 8064,
            "n_encoder_layers": 3,
            "n_decoder_layers": 3,
        },
        "data": {"train": "unused", "max_source_len": 512, "max_target_len": 114},
        "train": {"steps": 1000, "global_batch_size": 512, "micro_batch_size": 16},
    }
    return build_config(tree | sections, overrides=overrides)


def cluster_of(nodes: int = 1, gpus_per_node: int = 8, gpu: str = "h100") -> Cluster:
    return Cluster(nodes, gpus_per_node, find_gpu(gpu), 50e9)


def plan_of(*overrides: str, **cluster: Any) -> Plan:
    return Planner(cluster_of(**cluster)).plan(config_of(*overrides))


def test_zero_stages_hold_less_and_less() -> None:
    plans = [plan_of(f"parallel.zero_stage={stage}", "train.grad_accum_dtype=same") for stage in (0, 1, 2, 3)]
    n, states = plans[0].n_parameters, [plan.memory.states for plan in plans]
    held = [s.weights + s.gradients + s.optimizer for s in states]
    # Bytes a parameter with Adam in mixed precision over 8 ranks: 16, 4 + 12/N, 2 + 14/N, 16/N.
    assert [x / n for x in held] == pytest.approx([16, 5.5, 3.75, 2])
    assert states[3].gathered == pytest.approx(2 * n) and not any(s.gathered for s in states[:3])


def test_fp32_sums_a_moving_average_and_plain_fp32() -> None:
    n = plan_of().n_parameters
    summed = {stage: plan_of(f"parallel.zero_stage={stage}").memory.states for stage in (1, 2)}
    assert summed[1].gradients / n == pytest.approx(4) and summed[2].gradients / n == pytest.approx(4 / 8)
    averaged = plan_of("train.ema_decay=0.99", "parallel.zero_stage=2").memory.states
    assert averaged.optimizer / n == pytest.approx(16 / 8)
    plain = plan_of("train.precision=fp32", "parallel.zero_stage=0").memory.states
    assert (plain.weights + plain.gradients + plain.optimizer) / n == pytest.approx(16)


def test_offloading_moves_states_to_the_host() -> None:
    plan = plan_of("parallel.zero_stage=3", "parallel.offload=all")
    states = plan.memory.states
    assert states.weights == states.gradients == states.optimizer == 0 and states.gathered > 0
    assert plan.host_bytes / plan.n_parameters == pytest.approx(24)  # 12 + 8 of gradients + 2 x 2 of weights
    stayed = plan_of("parallel.zero_stage=3")
    assert plan.time.update > stayed.time.update and stayed.time.offload == 0
    shown = Planner(cluster_of(), Rates(hidden=0.0)).plan(plan.config)
    # Four micro-steps, twice an eighth of the weights to the device and once of the gradients back.
    assert shown.n_micro_steps == 4
    assert shown.time.offload == pytest.approx(4 * 3 * 2 * plan.n_parameters / 8 / (0.8 * 50e9))
    whole = plan_of("parallel.zero_stage=1", "parallel.offload=optimizer").memory.states.gradients
    part = plan_of("parallel.zero_stage=2", "parallel.offload=optimizer").memory.states.gradients
    assert whole - part == pytest.approx(4 * plan.n_parameters)


def test_gradients_travel_twice_where_whole_buckets_are_added_up() -> None:
    """Over a network so slow that nothing hides them: bytes a parameter and update of four micro-steps."""
    slow, gpu = 1e6, find_gpu("h100")
    cluster = Cluster(2, 1, gpu, slow)
    sent = {}
    for name, overrides in {
        "0": ["parallel.zero_stage=0"],
        "1 same": ["parallel.zero_stage=1", "train.grad_accum_dtype=same"],
        "1 fp32": ["parallel.zero_stage=1"],
        "2": ["parallel.zero_stage=2"],
        "2 scattered": [
            "parallel.zero_stage=2", "deepspeed.zero_optimization.use_multi_rank_bucket_allreduce=false"
        ],
        "3": ["parallel.zero_stage=3"],
    }.items():  # fmt: skip
        plan = Planner(cluster, Rates(links=1.0)).plan(config_of(*overrides, "train.global_batch_size=128"))
        assert plan.n_micro_steps == 4
        sent[name] = 2 * slow * plan.time.data_parallel / plan.n_parameters  # (N - 1) / N is a half
    expected = {"0": 4, "1 same": 6, "1 fp32": 10, "2": 4 * 4 + 2, "2 scattered": 4 * 2 + 2, "3": 4 * (2 + 2)}
    assert sent == pytest.approx(expected, rel=0.01)


def test_a_row_of_a_bucket_is_many_samples() -> None:
    plain = plan_of("data.packing=false", "train.micro_batch_size=8")
    buckets = plan_of(
        "data.packing=false",
        "data.bucket_tokens=4096",
        "train.micro_batch_size=1",
        "train.global_batch_size=64",
    )
    assert buckets.memory.activations == plain.memory.activations
    assert buckets.tokens_per_s == pytest.approx(plain.tokens_per_s, rel=0.1)
    text = "\n".join(describe(buckets))
    assert "64 buckets (of up to 8 samples of full length) a step" in text and "padding is not known" in text


def test_twins_are_work_too() -> None:
    wide = ("model.preset=vaswani2017_big", "train.micro_batch_size=64")
    once, twice = plan_of(*wide), plan_of(*wide, "train.r_drop=1")
    assert twice.mfu == pytest.approx(once.mfu, rel=0.15)
    assert twice.tokens_per_s < 0.7 * once.tokens_per_s


def test_fewer_rows_and_more_recomputation_need_less_memory() -> None:
    activations = [plan_of(f"train.micro_batch_size={rows}").memory.activations for rows in (4, 8, 16)]
    assert activations[1] < 0.6 * activations[2] and activations[0] < 0.65 * activations[1]
    recompute = [f"recompute.{side}=full" for side in ("encoder", "decoder")]
    full, plain = plan_of(*recompute), plan_of()
    assert full.memory.activations < 0.5 * plain.memory.activations
    assert full.time.total > 1.1 * plain.time.total and full.tokens_per_s < plain.tokens_per_s


def test_what_is_too_large_says_by_how_much() -> None:
    small = plan_of(gpu="h100")
    assert small.memory.fits and "fits, " in "\n".join(describe(small))
    gpu = find_gpu("h100")
    need = small.memory.total / GIB
    smaller = Cluster(1, 8, replace(gpu, memory_gib=need - 1.5), 50e9)
    cramped = Planner(smaller).plan(config_of())
    assert not cramped.memory.fits
    assert f"{need:.2f} of {need - 1.5:.1f}: does not fit, 1.5 too much" in "\n".join(describe(cramped))


def test_more_gpus_are_faster_but_not_more_than_in_proportion() -> None:
    one, eight, many = (plan_of(nodes=nodes, gpus_per_node=gpus) for nodes, gpus in ((1, 1), (1, 8), (4, 8)))
    assert one.time.data_parallel == 0 < eight.time.data_parallel
    assert 4 < eight.tokens_per_s / one.tokens_per_s <= 8
    assert 1 < many.tokens_per_s / eight.tokens_per_s <= 4
    assert 0.01 < one.mfu < 0.7


def test_faster_devices_and_better_programs() -> None:
    wide = ("model.preset=vaswani2017_big", "train.micro_batch_size=64")
    a100, h100, h200 = (plan_of(*wide, gpu=gpu).time for gpu in ("a100", "h100", "h200"))
    assert a100.total > h100.total > h200.total
    better = Planner(cluster_of(), Rates(products=0.9)).plan(config_of(*wide))
    assert better.time.total < h100.total


def test_small_kernels_wait_for_the_host() -> None:
    one, many = (plan_of(f"train.micro_batch_size={rows}").time for rows in (1, 64))
    assert one.bound_by_host > 0.8 and many.bound_by_host < 0.7
    text = "\n".join(describe(plan_of("train.micro_batch_size=1")))
    assert "the GPU would wait for Python" in text


def test_hooks_of_later_stages_cost_the_host_time() -> None:
    times = [plan_of(f"parallel.zero_stage={stage}", "train.micro_batch_size=1").time for stage in (1, 2, 3)]
    assert times[0].forward == times[1].forward < times[2].forward
    assert times[0].backward < times[1].backward < times[2].backward


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["parallel.tp_degree=16", "model.n_heads=16"], "parallel.tp_degree=16 does not divide the 8 ranks"),
        (
            ["train.global_batch_size=24", "train.micro_batch_size=8"],
            "is not a multiple of train.micro_batch_size=8",
        ),
    ],
)
def test_what_cannot_run_is_said(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_of(*overrides)


def test_search_finds_what_fits_and_is_fastest() -> None:
    config = config_of("model.n_encoder_layers=1", "model.n_decoder_layers=1", "recompute.encoder=full")
    given = Planner(cluster_of()).plan(config)
    said: list[str] = []
    best = search(Planner(cluster_of()), config, 4, said.append)
    assert 2 <= len(best) <= 4 and all(plan.memory.fits for plan in best) and said
    # Each slower one needs less memory.
    assert [p.memory.total for p in best] == sorted((p.memory.total for p in best), reverse=True)
    # In bf16 stage 0 would add micro-steps up in another precision.
    assert all(plan.config.parallel.zero_stage > 0 for plan in best)
    assert best[0].time.total <= 1.015 * min(plan.time.total for plan in best)
    assert best[0].time.total < given.time.total
    # They are plans of the layouts that they name.
    again = build_config(config.model_dump(mode="json"), overrides=layout_of(best[0].config).split())
    assert Planner(cluster_of()).plan(again).time == best[0].time
    lines = table(best, config)
    assert (
        len(lines) == 1 + len(best) and "recompute.encoder=none" in lines[1] and "tp_degree" not in lines[1]
    )
    assert table([given], config)[1].endswith("(as it is)")


def test_the_fastest_is_never_left_out_for_a_much_slower_one() -> None:
    """Each of these is a hair slower than the one before, and needs less: the first must not go for the last."""
    plan = plan_of()
    made = [
        replace(
            plan,
            time=replace(plan.time, forward=plan.time.forward + plan.time.total * 0.012 * i),
            memory=replace(plan.memory, activations=plan.memory.activations * 0.8**i),
        )
        for i in range(8)
    ]
    kept = _worth_it(made)
    times = [one.time.total / made[0].time.total for one in kept]
    assert times[0] <= 1.015 and times == sorted(times) and 2 < len(kept) < len(made)
    needed = [one.memory.total for one in kept]
    assert needed == sorted(needed, reverse=True)


def test_search_takes_every_micro_batch_that_goes() -> None:
    """Twelve rows a rank; the given layout is none that goes."""
    config = config_of(
        "model.n_encoder_layers=1", "model.n_decoder_layers=1", "train.global_batch_size=96",
        "train.micro_batch_size=32",
    )  # fmt: skip
    with pytest.raises(ConfigError, match="is not a multiple of"):
        Planner(cluster_of()).plan(config)
    found = search(Planner(cluster_of()), config, 30)
    assert found[0].config.train.micro_batch_size * found[0].dp_size in (96, 48)
    check_batch(Planner(cluster_of()), config)
    with pytest.raises(ConfigError, match="cannot be shared out over 14 GPUs: make it a multiple of 14"):
        check_batch(Planner(cluster_of(gpus_per_node=14)), config_of("train.micro_batch_size=1"))


def test_offloaded_gradients_are_sent_once_or_back_and_forth() -> None:
    """Over a link that hides nothing; four micro-steps of an eighth of the weights."""
    planner = Planner(cluster_of(), Rates(hidden=0.0, links=1.0))
    found = {
        dtype: planner.plan(
            config_of(
                "parallel.offload=optimizer", "parallel.zero_stage=2", f"train.grad_accum_dtype={dtype}"
            )
        )
        for dtype in ("fp32", "same")
    }
    bytes_sent = {dtype: 50e9 * 8 * plan.time.offload / plan.n_parameters for dtype, plan in found.items()}
    assert bytes_sent == pytest.approx({"fp32": 4 + 2, "same": 4 * 2 * 2 + 2})


def test_caveats_are_said() -> None:
    compiled = "\n".join(describe(plan_of("train.compile=true", "train.attention=flex", "model.dropout=0")))
    assert "Planned as if train.compile and train.attention=flex were off" in compiled
    assert "adds micro-steps' gradients up in bf16" in "\n".join(describe(plan_of("parallel.zero_stage=0")))
    whole = "\n".join(describe(plan_of("train.global_batch_size=64", "train.micro_batch_size=8")))
    assert "a larger train.global_batch_size" in whole and "as if" not in whole


def test_search_shares_layers_where_nothing_else_fits() -> None:
    gpu = find_gpu("l4")
    config = config_of(
        "model.preset=t5_v1_1_large", "model.vocab_size=32128",
        "model.n_encoder_layers=2", "model.n_decoder_layers=2", "model.d_ff=65536",
        "train.global_batch_size=8", "train.micro_batch_size=1", "train.grad_accum_dtype=same",
        "deepspeed.zero_optimization.reduce_bucket_size=1000000",
    )  # fmt: skip
    found = search(Planner(Cluster(1, 4, gpu, 50e9), reserved=17.6 * GIB), config, 3)
    assert found and all(plan.config.parallel.tp_degree > 2 for plan in found)
    assert search(Planner(Cluster(1, 4, gpu, 50e9), reserved=21.9 * GIB), config, 3) == []


def test_the_vocabulary_is_the_tokenizers_or_assumed() -> None:
    config = config_of(model={"preset": "t5_v1_1_small"})
    assert config.model.vocab_size is None
    known, source = known_vocabulary(config)
    assert known.model.vocab_size == 32128 and "assumed" in source
    assert known_vocabulary(known) == (known, "model.vocab_size")


def test_every_gpu_of_the_table_is_known() -> None:
    for name in GPUS:
        gpu = find_gpu(name.upper())
        assert gpu.peak_flops(torch.bfloat16) > gpu.bandwidth > gpu.link > 1e9
    with pytest.raises(ConfigError, match="--gpu h10 is not in the table: did you mean"):
        find_gpu("h10")
    with pytest.raises(ConfigError, match="there are b200, h200"):
        find_gpu("abacus")


def test_programs_read_bytes_and_seconds() -> None:
    plan = plan_of()
    found = as_json(plan)
    assert found["fits"] is True and found["memory_bytes"]["total"] == plan.memory.total
    assert found["step_seconds"]["total"] == pytest.approx(
        sum(v for k, v in found["step_seconds"].items() if k != "total")
    )


def test_durations() -> None:
    assert [duration(s) for s in (20, 720, 19200, 300000)] == ["20 s", "12 min", "5 h 20 min", "3 d 11 h"]
