"""A rank's part of the model with its weights, built so that no rank ever holds the whole."""

from collections.abc import Callable, Mapping
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn

from dist_transformer.config import Config
from dist_transformer.errors import CheckpointError
from dist_transformer.model import EncoderDecoder, build_model
from dist_transformer.model.initialize import fill, initial_value
from dist_transformer.parallel.layers import ColumnProject
from dist_transformer.parallel.mesh import Mesh
from dist_transformer.parallel.regions import TensorParallel
from dist_transformer.parallel.sharding import partition_of, place, shard


def build_part(
    config: Config,
    mesh: Mesh,
    tp: TensorParallel,
    deepspeed_config: dict[str, Any],
    weights: Mapping[str, Tensor] | None = None,
) -> EncoderDecoder:
    """The model as this rank holds it: its part of each layer, under ZeRO 3 its part of that.

    One parameter at a time is drawn as a whole (the same for every layout) or read, cut, and dropped: the most memory
    in use is this rank's part and one parameter.

    Args:
        weights: whole weights by name, in place of drawn ones.

    Raises:
        CheckpointError: if `weights` are not this model's.
    """
    model = build_model(config.model)
    if weights is not None:
        _check_names(model, weights)
    shard(model, tp)
    dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    partition_over_dp = _partitioner(config, mesh, deepspeed_config, dtype)

    def build(name: str, empty: nn.Parameter) -> nn.Parameter:
        partition = partition_of(empty)
        shape = empty.shape if partition is None else partition.whole_shape(empty.shape)
        if weights is None:
            whole = initial_value(name, shape, config.model, config.run.seed)
        else:
            whole = _given(weights, name, shape)
        part = whole if partition is None else partition.cut(whole)
        # A tensor of its own, contiguous, also where nothing is converted: a view would keep the whole.
        value = torch.empty(part.shape, dtype=dtype, device=mesh.device).copy_(part)
        parameter = place(empty, value, tp)
        partition_over_dp(parameter)
        return parameter

    fill(model, build)
    if config.parallel.zero_stage == 3:
        _register_readers(model)
    return model


def _partitioner(
    config: Config, mesh: Mesh, deepspeed_config: dict[str, Any], dtype: torch.dtype
) -> Callable[[nn.Parameter], None]:
    """What leaves a rank its data-parallel part of a parameter under ZeRO 3, and does nothing elsewhere."""
    if config.parallel.zero_stage < 3:
        return lambda parameter: None
    # `Init` counts ranks before it joins them: the first model of a process would be taken for a single rank's.
    deepspeed.init_distributed(deepspeed.get_accelerator().communication_backend_name(), verbose=False)
    # On an empty module: the model's own parameters come one by one.
    zero = deepspeed.zero.Init(
        module=nn.Module(),
        data_parallel_group=mesh.dp_group,
        config_dict_or_path=deepspeed_config,
        dtype=dtype,
        mpu=mesh,
    )
    return lambda parameter: zero._convert_to_zero_parameters([parameter])


def _register_readers(model: EncoderDecoder) -> None:
    """Tell ZeRO 3 which modules read other modules' weights, so that it fetches them ahead from the first step on."""
    for module in model.modules():
        if isinstance(module, ColumnProject):
            for parameter in (parameter for map_ in module.maps for parameter in map_.parameters()):
                deepspeed.zero.register_external_parameter(module, parameter)


def _check_names(model: EncoderDecoder, weights: Mapping[str, Tensor]) -> None:
    expected = {name for name, _ in model.named_parameters()}
    for name in sorted(expected ^ set(weights)):
        where = "is missing" if name in expected else "has no place in this model"
        raise CheckpointError(f"the given weights are another model's: {name} {where}")


def _given(weights: Mapping[str, Tensor], name: str, shape: torch.Size) -> Tensor:
    weight = weights[name]
    if weight.shape != shape:
        raise CheckpointError(
            f"the given weights are another model's: {name} is {list(weight.shape)} there and {list(shape)} here"
        )
    return weight
