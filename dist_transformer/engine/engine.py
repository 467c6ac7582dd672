"""One optimizer update over a list of micro-batches: DeepSpeed ZeRO underneath, token-exact loss on top."""

import contextlib
import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
from torch import Tensor

from dist_transformer.config import Config, Weights
from dist_transformer.data.batch import Batch
from dist_transformer.engine.allocator import keep_freed_memory
from dist_transformer.engine.average import MovingAverage
from dist_transformer.engine.build import build_part
from dist_transformer.engine.deepspeed_config import build_deepspeed_config, is_plain
from dist_transformer.engine.kernels import choose_kernels
from dist_transformer.engine.layouts import set_layouts
from dist_transformer.engine.masters import refresh_parameters, release_whole_parameters
from dist_transformer.engine.optim import RMSScaledAdamW, build_optimizer, learning_rate
from dist_transformer.model import EncoderDecoder, build_model
from dist_transformer.model.initialize import fill
from dist_transformer.parallel.compile import compile_layers, use_flex_attention
from dist_transformer.parallel.cross_entropy import TokenLoss
from dist_transformer.parallel.mesh import Mesh
from dist_transformer.parallel.objective import TrainingModule
from dist_transformer.parallel.random import first_seed
from dist_transformer.parallel.recompute import apply_recompute
from dist_transformer.parallel.regions import TensorParallel
from dist_transformer.parallel.sharding import gather_whole, partition_of


@dataclass
class StepResult:
    """What one update gives, before it is known on other ranks."""

    sums: Tensor
    """[3] float32 on the device: this rank's objective, cross-entropy (nats) and correct targets."""
    learning_rate: float
    grad_norm: float
    """Global norm before clipping; inf or NaN where the update was skipped."""
    applied: bool
    """False: the loss or the gradient was not finite and the weights are as before."""


class Engine:
    """The model on this rank, ready to train.

    Args:
        weights: initial weights by name, in place of random ones (fine-tuning).
    """

    def __init__(self, config: Config, mesh: Mesh, weights: Mapping[str, Tensor] | None = None) -> None:
        self.config, self.mesh = config, mesh
        if mesh.device.type == "cpu":
            keep_freed_memory()
        choose_kernels(config, mesh.device)
        self.deepspeed_config = build_deepspeed_config(config, mesh.dp_size)
        self.tp = TensorParallel.of(mesh, config.parallel.sequence_parallel)
        model = build_part(config, mesh, self.tp, self.deepspeed_config, weights)
        self.n_parameters = sum(parameter.numel() for parameter in build_model(config.model).parameters())
        if config.train.attention == "flex":
            use_flex_attention(model, mesh.device)
        if config.train.compile:
            compile_layers(model)
        apply_recompute(model, config.recompute)
        # Initial weights never read this generator: dropout does.
        torch.manual_seed(first_seed(config.run.seed, mesh.dp_rank, self.tp))
        module = TrainingModule(model, config.train, self.tp)
        optimizer = build_optimizer(module, config.optimizer)
        with contextlib.redirect_stdout(io.StringIO()):  # Some wrappers print their memory, on every rank.
            self.deepspeed, self.optimizer, _, _ = deepspeed.initialize(
                model=module,
                optimizer=optimizer,
                config=self.deepspeed_config,
                mpu=mesh,
                dist_init_required=False,
            )
        self._inner = optimizer
        if config.parallel.zero_stage in (1, 2) and config.parallel.offload == "none":
            # It would look at each gradient, a dozen kernels a parameter; the norm, which is taken anyway, tells too.
            self.optimizer.check_overflow = _not_looked_at
        for state in optimizer.state.values():
            # Some of DeepSpeed's wrappers take an update with zero gradients while they are built.
            if "step" in state:
                state["step"].zero_()
        if isinstance(optimizer, RMSScaledAdamW):
            set_layouts(self.optimizer, optimizer, mesh)
        decay = config.train.ema_decay
        self.average = None if decay is None else MovingAverage(self, decay)
        """Averaged weights, if the run keeps them."""

    @property
    def model(self) -> EncoderDecoder:
        """This rank's part of the encoder-decoder; the whole is inside `whole_model`."""
        model: EncoderDecoder = self.deepspeed.module.model
        return model

    def train_step(self, micro_batches: Sequence[Batch], n_target_tokens: int, step: int) -> StepResult:
        """Forward, backward and update number `step` (from 1).

        Args:
            micro_batches: this rank's share of the global batch.
            n_target_tokens: target tokens of the whole global batch: what the loss is divided by, once.
        """
        rate = self.set_learning_rate(step)
        sums = self.accumulate(micro_batches, n_target_tokens)
        norm, applied = self._update(sums)
        if applied and self.average is not None:
            self.average.update()
        return StepResult(sums, rate, norm, applied)

    def accumulate(self, micro_batches: Sequence[Batch], n_target_tokens: int) -> Tensor:
        """Forward and backward of all micro-steps, without the update; returns the sums of `StepResult`."""
        self.deepspeed.train()
        sums = torch.zeros(3, device=self.mesh.device)
        # ZeRO averages gradients over data-parallel ranks, so that the sum needs this factor back.
        scale = self.mesh.dp_size / max(1, n_target_tokens)
        for index, batch in enumerate(micro_batches):
            loss: TokenLoss = self.deepspeed(batch.to(self.mesh.device))
            self.deepspeed.backward(loss.objective * scale, scale_wrt_gas=False)
            sums += torch.stack([loss.objective.detach(), loss.cross_entropy, loss.n_correct])
            if index < len(micro_batches) - 1:
                self.deepspeed.step()  # counts the micro-step; updates nothing before the last one
        return sums

    def evaluate_batch(self, batch: Batch) -> TokenLoss:
        """Loss of a batch without dropout, smoothing, or gradient. A collective under ZeRO 3."""
        self.deepspeed.eval()
        with torch.no_grad():
            loss: TokenLoss = self.deepspeed(batch.to(self.mesh.device))
        return loss

    def set_learning_rate(self, step: int) -> float:
        """Set the learning rate of update number `step`, and return it."""
        rate = learning_rate(self.config.optimizer, step, self.config.train.steps)
        for group in {id(g): g for o in (self.optimizer, self._inner) for g in o.param_groups}.values():
            group["lr"] = rate
        return rate

    @contextmanager
    def weights(self, which: Weights) -> Iterator[None]:
        """The model with these weights, for evaluation; afterwards it is as before, bit for bit. A collective."""
        average = self.average if which == "ema" else None
        if average is None:
            yield
            return
        self._swap(average)
        try:
            yield
        finally:
            self._swap(average)

    def _swap(self, average: MovingAverage) -> None:
        release_whole_parameters(self)
        average.swap()
        refresh_parameters(self)

    @contextmanager
    def whole_model(self) -> Iterator[EncoderDecoder]:
        """The model in evaluation mode with all parameters on this rank, for decoding. A collective."""
        self.deepspeed.eval()
        is_whole = self.config.parallel.zero_stage < 3 and self.tp.size == 1
        yield self.model if is_whole else self._copy_of_model()

    def _copy_of_model(self) -> EncoderDecoder:
        """A copy that needs no other rank: in decoding, ranks take different numbers of steps."""
        copy = build_model(self.config.model)
        parts = dict(self.model.named_parameters())

        def gather(name: str, _: torch.nn.Parameter) -> torch.nn.Parameter:
            part = parts[name]
            with deepspeed.zero.GatheredParameters([part]):
                value = gather_whole(part.detach(), partition_of(part), self.tp).clone()
            return torch.nn.Parameter(value, requires_grad=False)

        fill(copy, gather)
        return copy.eval()

    def full_gradients(self) -> dict[str, Tensor]:
        """Every whole parameter's gradient as the update would see it, after `accumulate`. A collective."""
        is_sharded = self.config.parallel.zero_stage > 0
        gradients: dict[str, Tensor] = {}
        for name, parameter in self.model.named_parameters():
            gradient = deepspeed.utils.safe_get_full_grad(parameter) if is_sharded else parameter.grad
            if gradient is not None:
                gradients[name] = gather_whole(gradient, partition_of(parameter), self.tp)
        return gradients

    def _update(self, sums: Tensor) -> tuple[float, bool]:
        if is_plain(self.config):
            return self._plain_update()
        if self.config.parallel.zero_stage == 0:
            # This wrapper's norm asks each gradient, where the others ask the parameter.
            for parameter in self.model.parameters():
                if parameter.grad is not None and partition_of(parameter) is not None:
                    parameter.grad.tensor_model_parallel = True  # type: ignore[attr-defined]
        self.deepspeed.step()
        norm: Any = self.deepspeed.get_global_grad_norm()
        applied = bool(self.deepspeed.was_step_applied())
        if not applied:
            # With offloaded optimizer states, DeepSpeed 0.19.8 would add the next steps' gradients to the bad ones.
            kept = getattr(self.optimizer, "averaged_gradients", {})
            kept.update(dict.fromkeys(kept))
        return (float("nan") if norm is None else float(norm)), applied

    def _plain_update(self) -> tuple[float, bool]:
        """Without ZeRO or master weights DeepSpeed neither reports the norm nor skips bad updates."""
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        norm = self._plain_norm(parameters)
        finite = bool(torch.isfinite(norm))
        if not finite:
            for parameter in parameters:
                parameter.grad = None
        elif self.config.train.clip:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.config.train.clip, norm)
        self.deepspeed.step()
        return float(norm), finite

    def _plain_norm(self, parameters: Sequence[torch.nn.Parameter]) -> Tensor:
        """The gradients' global norm: what this rank alone has is added over ranks, what all have counts once."""
        own, common = (
            torch.nn.utils.get_total_norm(
                [p.grad for p in parameters if p.grad is not None and (partition_of(p) is not None) == is_own]
            )
            for is_own in (True, False)
        )
        if self.tp.size == 1:
            return common
        square = self.tp.all_reduce(own.to(self.mesh.device).square())
        return (square + common.square()).sqrt()


def _not_looked_at(partition_gradients: bool = True) -> None:
    """In place of a look for gradients that are not finite."""
