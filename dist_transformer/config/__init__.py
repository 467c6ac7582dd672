"""All configuration: classes, presets, loading. Imports no torch."""

from dist_transformer.config.data import CorpusConfig, DataConfig
from dist_transformer.config.evaluate import (
    LOWER_IS_BETTER,
    EarlyStoppingConfig,
    EvaluateConfig,
    Metric,
    TextMetric,
    TokenMetric,
    Weights,
)
from dist_transformer.config.faults import FaultsConfig
from dist_transformer.config.generate import GenerateConfig
from dist_transformer.config.load import build_config, dump_config, load_config, preset_names, shipped_files
from dist_transformer.config.model import ModelConfig, StackConfig
from dist_transformer.config.schema import (
    AlertConfig,
    CheckpointConfig,
    Config,
    OptimizerConfig,
    ParallelConfig,
    ProfileConfig,
    RecomputeConfig,
    RunConfig,
    TrackingConfig,
    TrainConfig,
    WandbConfig,
)

__all__ = [
    "LOWER_IS_BETTER",
    "AlertConfig",
    "CheckpointConfig",
    "Config",
    "CorpusConfig",
    "DataConfig",
    "EarlyStoppingConfig",
    "EvaluateConfig",
    "FaultsConfig",
    "GenerateConfig",
    "Metric",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "ProfileConfig",
    "RecomputeConfig",
    "RunConfig",
    "StackConfig",
    "TextMetric",
    "TokenMetric",
    "TrackingConfig",
    "TrainConfig",
    "WandbConfig",
    "Weights",
    "build_config",
    "dump_config",
    "load_config",
    "preset_names",
    "shipped_files",
]
