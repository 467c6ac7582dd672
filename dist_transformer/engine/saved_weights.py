"""Weights out of DeepSpeed's files: the optimizer's float32 ones, wherever a stage and a precision keep them."""

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import Tensor

_MODEL = "mp_rank_00_model_states.pt"


def read_weights(path: Path, master_names: list[str]) -> dict[str, Tensor]:
    """Every parameter in float32, by DeepSpeed's name, on one process.

    Args:
        master_names: what `names_of_masters` gave when the checkpoint was written.
    """
    partitions = sorted(path.glob("bf16_zero_pp_rank_*_optim_states.pt"), key=_rank)
    if partitions and "zero_stage" not in _load(partitions[0])["optimizer_state_dict"]:
        return _from_slices(path, partitions)
    if not list(path.glob("*_optim_states.pt")):
        return _from_one_file(_load(path / _MODEL), master_names)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        weights: dict[str, Tensor] = deepspeed.utils.zero_to_fp32.get_fp32_state_dict_from_zero_checkpoint(
            str(path.parent), tag=path.name
        )
    return weights


def names_of_masters(optimizer: Any, module: torch.nn.Module) -> list[str]:
    """Names in the order of the float32 copies that stage 0 keeps beside bfloat16 weights; empty elsewhere."""
    if not hasattr(optimizer, "fp32_groups"):
        return []
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    return [names[id(parameter)] for group in optimizer.fp16_groups for parameter in group]


def _from_one_file(file: dict[str, Any], master_names: list[str]) -> dict[str, Tensor]:
    """Stage 0: the module's own weights, or the copies that a mixed-precision optimizer keeps."""
    if not master_names:
        module: dict[str, Tensor] = file["module"]
        return module
    masters = [master for group in file["optimizer"]["fp32_groups"] for master in group]
    return {name: master.detach() for name, master in zip(master_names, masters, strict=True)}


def _from_slices(path: Path, partitions: list[Path]) -> dict[str, Tensor]:
    """Stage 1 in bfloat16: each rank's flat tensors, with the place of each parameter's piece in them."""
    pieces: dict[str, list[Tensor]] = {}
    for partition in partitions:
        for name, piece in _slices(_load(partition)["optimizer_state_dict"]):
            pieces.setdefault(name, []).append(piece)
    module = _load(path / _MODEL)["module"]
    return {name: torch.cat(found).view(module[name].shape) for name, found in pieces.items()}


def _slices(state: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    groups = zip(state["single_partition_of_fp32_groups"], state["param_slice_mappings"], strict=True)
    for flat, addresses in groups:
        for name, address in addresses.items():
            yield name, flat.detach().narrow(0, address.start, address.numel)


def _rank(path: Path) -> int:
    return int(path.name.split("_pp_rank_")[1].split("_")[0])


def _load(path: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=False)
    return loaded
