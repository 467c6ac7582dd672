"""Compilation: what lies between a layer's matrix products becomes few kernels (Ansel et al. 2024, PyTorch 2)."""

import os
import shutil
import sysconfig
from pathlib import Path

import torch

from dist_transformer.errors import ConfigError
from dist_transformer.model import EncoderDecoder


def compile_layers(model: EncoderDecoder) -> None:
    """Compile each layer's forward pass, in place, at its first call; parameter names stay as they are.

    Layers of a stack are the same program with other weights, so that a stack is compiled once for training and once
    for evaluation. Decoding, whose shapes change with every token, runs as it is.

    Raises:
        ConfigError: torch.compile would find no compiler.
    """
    if missing := missing_tool():
        raise ConfigError(
            f"train.compile needs {missing}, which this machine lacks: install it, or set it to false"
        )
    for stack in (model.encoder, model.decoder):
        for layer in stack.layers:
            layer.forward = torch.compile(layer.forward, dynamic=False)


def use_flex_attention(model: EncoderDecoder, device: torch.device) -> None:
    """Train with FlexAttention, whose kernels are compiled at the first step.

    Raises:
        ConfigError: there is no GPU, or torch.compile would find no compiler.
    """
    if device.type == "cpu":
        raise ConfigError("train.attention=flex needs a GPU: torch has no backward pass of it on CPUs")
    if missing := missing_tool():
        raise ConfigError(
            f"train.attention=flex needs {missing}, which this machine lacks: install it, or take sdpa"
        )
    for stack in (model.encoder, model.decoder):
        stack.kernel = "flex"


def missing_tool() -> str | None:
    """What torch.compile needs of a machine, on CPUs and GPUs alike, and this one has not got."""
    if not any(shutil.which(name) for name in (os.environ.get("CXX", ""), "g++", "clang++") if name):
        return "a C++ compiler (g++)"
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        return "Python's headers (python3-dev)"
    return None
