"""Plans of whole layouts: what fits, what is faster, what cannot be; and how they are told."""

from typing import Any

import pytest
import torch

from dist_transformer.config import Config, build_config
from dist_transformer.errors import ConfigError
from dist_transformer.plan.devices import GPUS, Rates, find_gpu
from dist_transformer.plan.planner import GIB, Plan, Planner, known_vocabulary, layout_of
from dist_transformer.plan.report import as_json, describe, duration, table
from dist_transformer.plan.speed import Cluster


def config_of(*overrides: str, **sections: Any) -> Config:
    tree: dict[str, Any] = {
        "run": {"dir": "unused"},
        "model": {"preset": "t5_v1_1_small", "vocab_size": 32128},
        "data": {"train": "unused", "max_source_len": 512, "max_target_len": 114},
        "train": {"steps": 1000, "global_batch_size": 512, "micro_batch_size": 16},
    }
    return build_config(tree | sections, overrides=overrides)


def cluster_of(nodes: int = 1, gpus_per_node: int = 8, gpu: str = "h100") -> Cluster:
    return Cluster(nodes, gpus_per_node, find_gpu(gpu), 50e9)


def plan_of(*overrides: str, **cluster: Any) -> Plan:
    return Planner(config_of(*overrides), cluster_of(**cluster)).plan()


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
    assert summed[1].gradients / n == pytest.approx(6) and summed[2].gradients / n == pytest.approx(4 / 8)
    averaged = plan_of("train.ema_decay=0.99", "parallel.zero_stage=2").memory.states
    assert averaged.optimizer / n == pytest.approx(16 / 8)
    plain = plan_of("train.precision=fp32", "parallel.zero_stage=0").memory.states
    assert (plain.weights + plain.gradients + plain.optimizer) / n == pytest.approx(16)


def test_offloading_moves_states_to_the_host() -> None:
    plan = plan_of("parallel.zero_stage=3", "parallel.offload=all")
    states = plan.memory.states
    assert states.weights == states.gradients == states.optimizer == 0 and states.gathered > 0
    assert plan.host_bytes / plan.n_parameters == pytest.approx(18)
    assert plan.time.update > plan_of("parallel.zero_stage=3").time.update


def test_fewer_rows_and_more_recomputation_need_less_memory() -> None:
    activations = [plan_of(f"train.micro_batch_size={rows}").memory.activations for rows in (4, 8, 16)]
    assert activations[1] < 0.6 * activations[2] and activations[0] < 0.65 * activations[1]
    recompute = [f"recompute.{side}=full" for side in ("encoder", "decoder")]
    full, plain = plan_of(*recompute), plan_of()
    assert full.memory.activations < 0.35 * plain.memory.activations
    assert full.time.total > 1.1 * plain.time.total and full.tokens_per_s < plain.tokens_per_s


def test_what_is_too_large_says_by_how_much() -> None:
    small = plan_of(gpu="h100")
    assert small.memory.fits and "fits, " in "\n".join(describe(small))
    gpu = find_gpu("h100")
    need = small.memory.total / GIB
    cramped = Planner(
        config_of(), Cluster(1, 8, type(gpu)(gpu.name, need - 1.5, gpu.bandwidth, gpu.link), 50e9)
    ).plan()
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
    better = Planner(config_of(*wide), cluster_of(), Rates(products=0.9)).plan()
    assert better.time.forward < h100.forward


def test_small_kernels_wait_for_the_host() -> None:
    one, many = (plan_of(f"train.micro_batch_size={rows}").time for rows in (1, 64))
    assert one.bound_by_host > 0.8 and many.bound_by_host < 0.5
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
    config = config_of("model.n_encoder_layers=2", "model.n_decoder_layers=2", "recompute.encoder=full")
    given = Planner(config, cluster_of()).plan()
    said: list[str] = []
    best = Planner(config, cluster_of()).search(4, said.append)
    assert 1 <= len(best) <= 4 and all(plan.memory.fits for plan in best) and said
    assert best[0].time.total == min(plan.time.total for plan in best)
    assert best[0].time.total < given.time.total
    # They are plans of the layouts that they name.
    again = build_config(config.model_dump(mode="json"), overrides=layout_of(best[0].config).split())
    assert Planner(again, cluster_of()).plan().time == best[0].time
    lines = table(best, config)
    assert (
        len(lines) == 1 + len(best) and "recompute.encoder=none" in lines[1] and "tp_degree" not in lines[1]
    )
    assert table([given], config)[1].endswith("(as it is)")


def test_search_shares_layers_where_nothing_else_fits() -> None:
    gpu = find_gpu("l4")
    config = config_of(
        "model.preset=t5_v1_1_large", "model.n_encoder_layers=2", "model.n_decoder_layers=2", "model.d_ff=65536",
        "train.global_batch_size=8", "train.micro_batch_size=1", "train.grad_accum_dtype=same",
        "deepspeed.zero_optimization.reduce_bucket_size=1000000",
    )  # fmt: skip
    found = Planner(config, Cluster(1, 4, gpu, 50e9), reserved=17.6 * GIB).search(3)
    assert found and all(plan.config.parallel.tp_degree > 2 for plan in found)
    assert Planner(config, Cluster(1, 4, gpu, 50e9), reserved=21.9 * GIB).search(3) == []


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
    assert [duration(s) for s in (20, 720, 19200, 300000)] == ["1 min", "12 min", "5 h 20 min", "3 d 11 h"]
