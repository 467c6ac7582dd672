"""The shipped DeepSpeed settings of a ZeRO stage: files that people can read and override."""

from typing import Any

import yaml

from dist_transformer.config.load import merge, shipped_files
from dist_transformer.config.schema import Config


def stage_settings(config: Config, dp_size: int) -> dict[str, Any]:
    """What `configs/deepspeed/` has for the run's stage and offloading, as DeepSpeed's configuration has it.

    A single data-parallel rank has nobody to talk to while it computes: overlapping would only double buckets, and
    make the host wait for the device after each backward pass.
    """
    parallel = config.parallel
    name = (
        f"zero_{parallel.zero_stage}_offload" if parallel.offload == "all" else f"zero_{parallel.zero_stage}"
    )
    tree = yaml.safe_load(
        (shipped_files("configs") / "deepspeed" / f"{name}.yaml").read_text(encoding="utf-8")
    )
    assert isinstance(tree, dict)
    if parallel.offload == "optimizer":
        tree["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    if dp_size == 1 and parallel.zero_stage:
        tree["zero_optimization"]["overlap_comm"] = False
    return tree


def zero_settings(config: Config, dp_size: int) -> dict[str, Any]:
    """DeepSpeed's section `zero_optimization`, with the run's own keys over it."""
    settings: dict[str, Any] = merge(stage_settings(config, dp_size), config.deepspeed)["zero_optimization"]
    return settings
