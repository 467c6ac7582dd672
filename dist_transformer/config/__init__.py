"""All configuration: classes, presets, loading. Imports no torch."""

from dist_transformer.config.data import CorpusConfig, DataConfig
from dist_transformer.config.faults import FaultsConfig
from dist_transformer.config.load import build_config, dump_config, load_config, preset_names, shipped_files
from dist_transformer.config.model import ModelConfig, StackConfig
from dist_transformer.config.schema import (
    AlertConfig,
    CheckpointConfig,
    Config,
    EvaluateConfig,
    GenerateConfig,
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
    "AlertConfig",
    "CheckpointConfig",
    "Config",
    "CorpusConfig",
    "DataConfig",
    "EvaluateConfig",
    "FaultsConfig",
    "GenerateConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "ProfileConfig",
    "RecomputeConfig",
    "RunConfig",
    "StackConfig",
    "TrackingConfig",
    "TrainConfig",
    "WandbConfig",
    "build_config",
    "dump_config",
    "load_config",
    "preset_names",
    "shipped_files",
]
