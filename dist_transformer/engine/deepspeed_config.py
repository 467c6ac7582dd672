"""DeepSpeed's own configuration, built from ours."""

from typing import Any

from dist_transformer.config import Config
from dist_transformer.config.layout import grad_accum_steps
from dist_transformer.config.load import merge
from dist_transformer.config.zero import stage_settings


def build_deepspeed_config(config: Config, dp_size: int) -> dict[str, Any]:
    """The dictionary `deepspeed.initialize` takes, the user's extra keys merged in.

    Raises:
        ConfigError: if batch sizes, accumulation and ranks do not fit together.
    """
    train, parallel = config.train, config.parallel
    # DeepSpeed's stage 0 in bf16 cannot accumulate in another precision than the parameters'.
    accumulate_fp32 = (
        train.precision == "bf16" and train.grad_accum_dtype == "fp32" and parallel.zero_stage > 0
    )
    tree = merge(
        stage_settings(config, dp_size),
        {
            "train_batch_size": train.global_batch_size,
            "train_micro_batch_size_per_gpu": train.micro_batch_size,
            "gradient_accumulation_steps": grad_accum_steps(config, dp_size),
            # Stage 0 in fp32 has no DeepSpeed optimizer around it: `Engine` clips there itself.
            "gradient_clipping": 0.0 if is_plain(config) else train.clip,
            "bf16": {
                "enabled": train.precision == "bf16",
                "check_grad_overflow": True,
                # Where stage 1 adds up in fp32: as gradients come, and not once more beside them in bf16.
                "immediate_grad_update": True,
            },
            "data_types": {"grad_accum_dtype": "fp32" if accumulate_fp32 else None},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 2**31 - 1,
            # It would wait for the device before each forward pass, for a figure that nobody reads.
            "timers": {"throughput": {"enabled": False, "synchronized": False}},
        },
    )
    if accumulate_fp32 and parallel.zero_stage == 1:
        # Reduced once an update: in bf16, as DeepSpeed would have it, the sums were rounded even on one rank.
        tree["communication_data_type"] = "fp32"
    return merge(tree, config.deepspeed)


def is_plain(config: Config) -> bool:
    """True where DeepSpeed runs the optimizer bare: no ZeRO, no master weights."""
    return config.parallel.zero_stage == 0 and config.train.precision == "fp32"
