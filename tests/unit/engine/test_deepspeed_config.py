"""Batch arithmetic with suggestions that work, and DeepSpeed's settings built from ours."""

import re
from typing import Any

import pytest

from dist_transformer.config import Config, build_config
from dist_transformer.config.layout import grad_accum_steps
from dist_transformer.engine.deepspeed_config import build_deepspeed_config, is_plain
from dist_transformer.errors import ConfigError


def config_of(train: dict[str, Any] | None = None, **sections: dict[str, Any]) -> Config:
    return build_config(
        {
            "run": {"dir": "x"},
            "data": {"train": "x"},
            "train": {"steps": 1, "global_batch_size": 48, "micro_batch_size": 4, **(train or {})},
            **sections,
        }
    )


@pytest.mark.parametrize(("dp_size", "n_micro_steps"), [(1, 12), (2, 6), (3, 4), (4, 3), (6, 2), (12, 1)])
def test_batch_sizes(dp_size: int, n_micro_steps: int) -> None:
    config = config_of()
    assert grad_accum_steps(config, dp_size) == n_micro_steps
    tree = build_deepspeed_config(config, dp_size)
    assert tree["train_batch_size"] == 48
    assert tree["train_micro_batch_size_per_gpu"] * tree["gradient_accumulation_steps"] * dp_size == 48


@pytest.mark.parametrize(("dp_size", "micro_batch_size"), [(8, 4), (16, 2), (24, 4), (2, 16), (48, 4)])
def test_what_is_suggested_works(dp_size: int, micro_batch_size: int) -> None:
    train = {"micro_batch_size": micro_batch_size}
    with pytest.raises(ConfigError) as caught:
        grad_accum_steps(config_of(train), dp_size)
    sentence = str(caught.value)
    assert f"train.micro_batch_size={micro_batch_size} x {dp_size} data-parallel ranks" in sentence
    suggested = re.findall(r"try train\.micro_batch_size=([\d or]+)", sentence)[0].split(" or ")
    assert suggested
    for size in suggested:
        assert grad_accum_steps(config_of({"micro_batch_size": int(size)}), dp_size) >= 1


def test_more_ranks_than_rows() -> None:
    with pytest.raises(ConfigError, match=r"make train\.global_batch_size a multiple of 64"):
        grad_accum_steps(config_of(), 64)
    with pytest.raises(ConfigError, match=r"make train\.global_batch_size a multiple of 5"):
        grad_accum_steps(config_of(), 5)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_precision_and_clipping(stage: int, precision: str) -> None:
    config = config_of({"precision": precision, "clip": 0.7}, parallel={"zero_stage": stage})
    tree = build_deepspeed_config(config, 2)
    assert tree["zero_optimization"]["stage"] == stage
    assert tree["bf16"]["enabled"] == (precision == "bf16")
    assert tree["bf16"]["check_grad_overflow"]
    assert is_plain(config) == (stage == 0 and precision == "fp32")
    # Where DeepSpeed runs a bare optimizer, we clip: it must not do so again.
    assert tree["gradient_clipping"] == (0.0 if is_plain(config) else 0.7)
    fp32_sums = precision == "bf16" and stage > 0
    assert tree["data_types"]["grad_accum_dtype"] == ("fp32" if fp32_sums else None)
    # Stage 1 exchanges these sums, once an update; the others exchange the gradients of each micro-step.
    assert tree.get("communication_data_type") == ("fp32" if fp32_sums and stage == 1 else None)
    assert not tree["timers"]["throughput"]["enabled"]


def test_gradients_may_add_up_in_the_parameters_precision() -> None:
    config = config_of({"precision": "bf16", "grad_accum_dtype": "same"})
    assert build_deepspeed_config(config, 1)["data_types"]["grad_accum_dtype"] is None


@pytest.mark.parametrize(
    ("stage", "offload", "optimizer", "parameters"),
    [
        (1, "none", None, None),
        (1, "optimizer", "cpu", None),
        (2, "optimizer", "cpu", None),
        (3, "optimizer", "cpu", None),
        (3, "all", "cpu", "cpu"),
    ],
)
def test_offload(stage: int, offload: str, optimizer: str | None, parameters: str | None) -> None:
    zero = build_deepspeed_config(config_of(parallel={"zero_stage": stage, "offload": offload}), 1)[
        "zero_optimization"
    ]
    assert zero["stage"] == stage
    assert zero.get("offload_optimizer", {}).get("device") == optimizer
    assert zero.get("offload_param", {}).get("device") == parameters


def test_a_users_keys_are_merged_into_ours() -> None:
    extra = {
        "zero_optimization": {"reduce_bucket_size": 77, "offload_optimizer": {"pin_memory": False}},
        "wall_clock_breakdown": True,
    }
    config = config_of(parallel={"zero_stage": 2, "offload": "optimizer"}, deepspeed=extra)
    tree = build_deepspeed_config(config, 1)
    zero = tree["zero_optimization"]
    assert zero["reduce_bucket_size"] == 77
    assert zero["offload_optimizer"] == {"device": "cpu", "pin_memory": False}
    assert zero["allgather_bucket_size"] == 200_000_000
    assert tree["wall_clock_breakdown"] is True
    assert config.deepspeed == extra, "merging changed the configuration"


def test_building_twice_gives_the_same() -> None:
    config = config_of(parallel={"zero_stage": 3, "offload": "optimizer"})
    first = build_deepspeed_config(config, 2)
    first["zero_optimization"]["stage"] = 0
    assert build_deepspeed_config(config, 2)["zero_optimization"]["stage"] == 3
