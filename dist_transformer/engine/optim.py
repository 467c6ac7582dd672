"""The update rule and its learning rate: AdamW, AdamW with steps scaled to each tensor, schedules with warm-up."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from dist_transformer.config import OptimizerConfig

_SMALLEST_RMS = 1e-3
_Method = TypeVar("_Method", bound=Callable[..., Any])


def learning_rate(config: OptimizerConfig, step: int, n_steps: int) -> float:
    """The learning rate of update number `step`, counted from 1; the last update has number `n_steps`.

    Linear warm-up from 0 to `lr`, then by schedule. inverse_sqrt is the paper's (section 5.3, equation 3):
    lr sqrt(warmup / step), which with lr = (d_model x warmup)^-0.5 is the paper's own scale.
    """
    if step < config.warmup_steps:
        return config.lr * step / config.warmup_steps
    if config.schedule == "inverse_sqrt":
        return config.lr * math.sqrt(max(1, config.warmup_steps) / max(1, step))
    if config.schedule == "constant":
        return config.lr
    done = min(1.0, (step - config.warmup_steps) / max(1, n_steps - config.warmup_steps))
    share = 1.0 - done if config.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
    return config.lr * (config.min_lr_ratio + (1.0 - config.min_lr_ratio) * share)


def build_optimizer(module: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """The optimizer over a module's parameters, with decay on matrices only.

    Its learning rate is 0 until one is set for a step: DeepSpeed may take an empty update before the first one.
    """
    groups = _decay_groups(module.named_parameters(), config.weight_decay)
    if config.name == "adamw_rms":
        return RMSScaledAdamW(groups, 0.0, config.betas, config.eps)
    return AdamW(groups, lr=0.0, betas=config.betas, eps=config.eps, fused=True)


def _decay_groups(
    parameters: Iterable[tuple[str, nn.Parameter]], weight_decay: float
) -> list[dict[str, Any]]:
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in parameters:
        # ZeRO 3 leaves a flat part of a parameter, and its shape beside.
        shape = getattr(parameter, "ds_shape", parameter.shape)
        is_matrix = len(shape) > 1 and not name.endswith(("relative_bias.weight", "learned.weight"))
        (decayed if is_matrix else plain).append(parameter)
    if not weight_decay:
        return [{"params": decayed + plain, "weight_decay": 0.0}]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


@dataclass
class Segment:
    """The part of one parameter that lies in a flat tensor of ZeRO's."""

    start: int
    length: int
    index: int
    """Which parameter of the group, counted over all ranks alike."""
    numel: int
    """Elements of the whole parameter, over all ranks."""


@dataclass
class Layout:
    """How parameters lie in the flat tensor that ZeRO hands to the optimizer."""

    segments: list[Segment]
    n_parameters: int
    all_reduce: Callable[[Tensor], None] = field(default=lambda values: None)
    """Adds a vector over the ranks that share the flat tensor, in place."""


def _plain(method: _Method) -> _Method:
    """A method of torch's optimizers without what tells torch's compiler to leave it alone.

    That wrapper imports the compiler, at the first call: nearly 2 s of CPU time of every rank's start, for nothing.
    """
    plain: _Method = getattr(method, "__wrapped__", method)
    return plain


class _Uncompiled(torch.optim.Optimizer):
    """An optimizer that does not load torch's compiler."""

    add_param_group = _plain(torch.optim.Optimizer.add_param_group)
    zero_grad = _plain(torch.optim.Optimizer.zero_grad)
    state_dict = _plain(torch.optim.Optimizer.state_dict)
    load_state_dict = _plain(torch.optim.Optimizer.load_state_dict)


class AdamW(_Uncompiled, torch.optim.AdamW):
    """torch's."""

    step = torch.no_grad()(_plain(torch.optim.AdamW.step))


class RMSScaledAdamW(_Uncompiled):
    """AdamW whose step on each parameter is multiplied by max(1e-3, RMS(parameter)).

    The relative step size of Adafactor (Shazeer and Stern 2018, algorithm 4) with Adam's moments: with the learning
    rates that T5 was trained with (1e-2), plain AdamW diverges and this does not.

    ZeRO hands the optimizer flat pieces of many parameters; `layouts` then says which elements are whose
    (see `engine.layouts`). A tensor without a layout is a parameter by itself.
    """

    def __init__(
        self, groups: list[dict[str, Any]], lr: float, betas: tuple[float, float], eps: float
    ) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})
        self.layouts: dict[int, Layout] = {}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every tensor that has a gradient."""
        for group in self.param_groups:
            for tensor in group["params"]:
                if tensor.grad is not None:
                    self._update(tensor, group)

    def _update(self, tensor: Tensor, group: dict[str, Any]) -> None:
        beta1, beta2 = group["betas"]
        state = self.state[tensor]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(tensor), torch.zeros_like(tensor)
        state["step"] += 1
        step = state["step"].item()
        grad = tensor.grad
        assert grad is not None
        grad = grad.to(tensor.dtype)
        state["exp_avg"].lerp_(grad, 1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        denominator = (state["exp_avg_sq"].sqrt() / math.sqrt(1 - beta2**step)).add_(group["eps"])
        update = (state["exp_avg"] / denominator).div_(1 - beta1**step)
        self._scale(tensor, update)
        if group["weight_decay"]:
            tensor.mul_(1 - group["lr"] * group["weight_decay"])
        tensor.add_(update, alpha=-group["lr"])

    def _scale(self, tensor: Tensor, update: Tensor) -> None:
        """Multiply each parameter's part of the update by that parameter's root mean square."""
        layout = self.layouts.get(id(tensor))
        if layout is None:
            update.mul_(tensor.square().mean().sqrt().clamp_(min=_SMALLEST_RMS))
            return
        squares = torch.zeros(layout.n_parameters, dtype=torch.float32, device=tensor.device)
        for part in layout.segments:
            squares[part.index] = tensor[part.start : part.start + part.length].float().square().sum()
        layout.all_reduce(squares)
        for part in layout.segments:
            rms = (squares[part.index] / part.numel).sqrt_().clamp_(min=_SMALLEST_RMS)
            update[part.start : part.start + part.length].mul_(rms)
