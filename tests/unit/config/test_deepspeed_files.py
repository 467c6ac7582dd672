"""Every file of `configs/deepspeed` is used by some stage and is one that DeepSpeed takes; what we own is refused."""

import re
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from dist_transformer.config import Config, ParallelConfig, build_config, shipped_files
from dist_transformer.config.schema import OWNED_DEEPSPEED_KEYS
from dist_transformer.errors import ConfigError

FOLDER = shipped_files("configs") / "deepspeed"
CHOICES = [
    (stage, offload)
    for stage in get_args(ParallelConfig.model_fields["zero_stage"].annotation)
    for offload in get_args(ParallelConfig.model_fields["offload"].annotation)
]


def config_of(stage: int, offload: str, **deepspeed: Any) -> Config:
    return build_config(
        {
            "run": {"dir": "x"},
            "data": {"train": "x"},
            "train": {"steps": 1},
            "parallel": {"zero_stage": stage, "offload": offload},
            "deepspeed": deepspeed,
        }
    )


def test_offload_is_refused_where_it_means_nothing() -> None:
    accepted = []
    for stage, offload in CHOICES:
        try:
            config_of(stage, offload)
        except ConfigError as error:
            assert f"offload={offload} needs zero_stage" in str(error)
        else:
            accepted.append((stage, offload))
    stages = [(stage, "none") for stage in range(4)] + [(stage, "optimizer") for stage in (1, 2, 3)]
    assert sorted(accepted) == sorted([*stages, (3, "all")])


def test_every_file_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    from dist_transformer.engine import deepspeed_config

    read: list[str] = []
    real = Path.read_text

    def remember(path: Path, *arguments: Any, **options: Any) -> str:
        read.append(path.name)
        return real(path, *arguments, **options)

    monkeypatch.setattr(Path, "read_text", remember)
    for stage, offload in CHOICES:
        try:
            config = config_of(stage, offload)
        except ConfigError:
            continue
        built = deepspeed_config.build_deepspeed_config(config, 1)
        assert built["zero_optimization"]["stage"] == stage
    assert set(read) == {path.name for path in FOLDER.iterdir()}


@pytest.mark.parametrize("path", sorted(FOLDER.iterdir()), ids=lambda path: path.stem)
def test_every_file_is_one_that_deepspeed_knows(path: Path) -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    tree = yaml.safe_load(path.read_text())
    assert set(tree) == {"zero_optimization"}
    unknown = (
        set(tree["zero_optimization"])
        - set(DeepSpeedZeroConfig.model_fields)
        - {field.alias for field in DeepSpeedZeroConfig.model_fields.values()}
    )
    assert not unknown
    DeepSpeedZeroConfig(**tree["zero_optimization"])


@pytest.mark.parametrize("key", OWNED_DEEPSPEED_KEYS)
def test_keys_that_we_own_are_refused(key: str) -> None:
    first, *rest = key.split(".")
    value: object = 1
    for name in reversed(rest):
        value = {name: value}
    with pytest.raises(ConfigError) as caught:
        config_of(2, "none", **{first: value})
    assert f"deepspeed.{key} is ours to set: use {OWNED_DEEPSPEED_KEYS[key]}" in str(caught.value)


def test_what_is_named_instead_exists() -> None:
    tree = config_of(2, "none").model_dump()
    for named in OWNED_DEEPSPEED_KEYS.values():
        for path in re.findall(r"[a-z_]+(?:\.[a-z_]+)*", named.partition(" (")[0].replace(" and ", ",")):
            value: Any = tree
            for name in path.split("."):
                assert name in value, path
                value = value[name]


@pytest.mark.parametrize("key", ["train_batch_size", "bf16", "optimizer", "wandb", "zero_optimization.stage"])
def test_what_would_break_the_arithmetic_is_owned(key: str) -> None:
    assert key in OWNED_DEEPSPEED_KEYS


def test_the_stage_is_ours_too_and_the_rest_is_not() -> None:
    with pytest.raises(
        ConfigError, match=r"zero_optimization\.stage is ours to set: use parallel\.zero_stage"
    ):
        config_of(2, "none", zero_optimization={"stage": 3})
    config_of(2, "none", zero_optimization={"overlap_comm": False}, wall_clock_breakdown=True)
