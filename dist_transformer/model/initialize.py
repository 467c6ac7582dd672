"""Initial weights: a function of (seed, parameter name) alone, so that every layout starts from the same ones."""

import hashlib
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from dist_transformer.config import ModelConfig
from dist_transformer.model.transformer import EncoderDecoder


def initialize(model: EncoderDecoder, seed: int, device: torch.device) -> None:
    """Move a model from the meta device to `device` with its initial weights, in float32."""
    fill(
        model,
        lambda name, empty: nn.Parameter(initial_value(name, empty.shape, model.config, seed).to(device)),
    )


def fill(model: EncoderDecoder, build: Callable[[str, nn.Parameter], nn.Parameter]) -> None:
    """Put `build(name, parameter)` in the place of each parameter on the meta device, one at a time."""
    for module_name, module in model.named_modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                setattr(module, name, build(f"{module_name}.{name}", parameter))


def initial_value(name: str, shape: torch.Size, config: ModelConfig, seed: int) -> Tensor:
    """One parameter's initial value on the CPU, drawn by a generator of its own."""
    module, kind = name.split(".")[-2:]
    if kind == "bias":
        return torch.zeros(shape)
    if module.endswith("norm"):
        return torch.ones(shape)
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    if config.init == "xavier" and module in _MATRICES:
        limit = math.sqrt(6.0 / (shape[0] + shape[1]))
        return torch.empty(shape).uniform_(-limit, limit, generator=generator)
    return torch.empty(shape).normal_(0.0, _standard_deviation(name, shape, config), generator=generator)


_MATRICES = {"q_proj", "k_proj", "v_proj", "o_proj", "up", "gate", "down", "output"}


def _standard_deviation(name: str, shape: torch.Size, config: ModelConfig) -> float:
    """Of a normally distributed parameter, by scheme.

    t5: Mesh TensorFlow's scheme (fan-in; queries also carry the missing 1/sqrt(head_dim) of the scores), with the
    output projection at fan-in as in T5X, so that the first loss is near log(V).
    normal: 0.02, and 0.02 / sqrt(2 x layers) for what is added to the residual stream (GPT-2).
    """
    module = name.split(".")[-2]
    stack = config.stack("decoder" if name.startswith(("decoder", "target")) else "encoder")
    if module == "learned":
        return 0.02
    if config.init == "xavier":
        # With scale_embeddings, the embedded token then has unit variance.
        return 1.0 / math.sqrt(shape[-1])
    if config.init == "normal":
        is_residual = module in {"o_proj", "down"}
        return 0.02 / math.sqrt(2 * max(1, stack.n_layers)) if is_residual else 0.02
    if module.endswith("embedding"):
        return 1.0 if config.tie_embeddings != "all" or config.scale_logits else 1.0 / math.sqrt(shape[-1])
    if module == "relative_bias":
        return 1.0 / math.sqrt(stack.d_model)
    if module == "q_proj":
        return 1.0 / math.sqrt(shape[1] * stack.head_dim)
    return 1.0 / math.sqrt(shape[1])
