"""Learning rates against values by hand, which parameters decay, and updates against slow references."""

import copy
import math
import subprocess
import sys
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from dist_transformer.config import OptimizerConfig
from dist_transformer.engine.optim import Layout, RMSScaledAdamW, Segment, build_optimizer, learning_rate
from dist_transformer.model import build_model
from tests.unit.model.small import KINDS, small_config


def schedule(name: str, **fields: Any) -> OptimizerConfig:
    return OptimizerConfig.model_validate({"schedule": name, "lr": 0.2, "warmup_steps": 4, **fields})


@pytest.mark.parametrize(
    ("name", "rates"),
    [
        # Steps 1 to 12 of 12; 4 of warm-up.
        ("constant", [0.05, 0.1, 0.15, 0.2, 0.2, 0.2, 0.2, 0.2, 0.2, 0.2, 0.2, 0.2]),
        ("linear", [0.05, 0.1, 0.15, 0.2, 0.175, 0.15, 0.125, 0.1, 0.075, 0.05, 0.025, 0.0]),
        ("cosine", [0.05, 0.1, 0.15, 0.2, *[0.1 * (1 + math.cos(math.pi * k / 8)) for k in range(1, 9)]]),
        ("inverse_sqrt", [0.05, 0.1, 0.15, 0.2, *[0.4 / math.sqrt(step) for step in range(5, 13)]]),
    ],
)
def test_schedules(name: str, rates: list[float]) -> None:
    found = [learning_rate(schedule(name), step, 12) for step in range(1, 13)]
    assert found == pytest.approx(rates, abs=1e-12)
    assert max(found) == found[3] == 0.2


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_where_a_schedule_ends(name: str) -> None:
    config = schedule(name, min_lr_ratio=0.1)
    assert learning_rate(config, 12, 12) == pytest.approx(0.02)
    assert learning_rate(config, 8, 12) == pytest.approx(0.11)
    # A run that goes on behind its end stays there.
    assert learning_rate(config, 99, 12) == pytest.approx(0.02)


@pytest.mark.parametrize("name", get_args(OptimizerConfig.model_fields["schedule"].annotation))
def test_warm_up_edges(name: str) -> None:
    without = schedule(name, warmup_steps=0)
    assert 0 < learning_rate(without, 1, 100) <= 0.2
    if name in ("constant", "inverse_sqrt"):
        assert learning_rate(without, 1, 100) == 0.2
    # Warm-up as long as the run, and longer: a straight line.
    assert learning_rate(schedule(name, warmup_steps=10), 10, 10) == pytest.approx(0.2)
    assert learning_rate(schedule(name, warmup_steps=100), 10, 10) == pytest.approx(0.02)
    one = schedule(name, warmup_steps=1)
    assert learning_rate(one, 1, 100) == pytest.approx(0.2)


def test_the_papers_own_formula() -> None:
    """d_model^-0.5 min(step^-0.5, step x warmup^-1.5): equation 3."""
    d_model, warmup = 512, 4000
    config = schedule("inverse_sqrt", lr=(d_model * warmup) ** -0.5, warmup_steps=warmup)
    for step in (1, 10, 3999, 4000, 4001, 100_000):
        expected = d_model**-0.5 * min(step**-0.5, step * warmup**-1.5)
        assert learning_rate(config, step, 100_000) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_only_matrices_decay(kind: str) -> None:
    model = build_model(small_config(kind)).to_empty(device="cpu")
    optimizer = build_optimizer(model, OptimizerConfig(weight_decay=0.1))
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert len(decays) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        is_plain = "norm" in name or name.endswith(".bias") or "relative_bias" in name or "learned" in name
        assert decays[id(parameter)] == (0.0 if is_plain else 0.1), name
        assert parameter.dim() == 2 or is_plain
    assert {group["lr"] for group in optimizer.param_groups} == {0.0}


def parameters(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(6, 5), (7,), (3, 2, 4)]
    return [
        torch.randn(shape, generator=generator) * scale
        for shape, scale in zip(shapes, (1, 1e-5, 7), strict=True)
    ]


def gradients(seed: int) -> list[Tensor]:
    return [gradient * 10 for gradient in parameters(1000 + seed)]


def reference(values: list[Tensor], n_steps: int, rate: float, decay: float, scaled: bool) -> list[Tensor]:
    """Adam of the paper (Kingma and Ba, algorithm 1) with decoupled decay, one number at a time, in float64."""
    beta1, beta2, eps = 0.9, 0.98, 1e-9
    results = []
    for index, value in enumerate(values):
        x = value.double().flatten().tolist()
        m, v = [0.0] * len(x), [0.0] * len(x)
        for t in range(1, n_steps + 1):
            gradient = gradients(t)[index].double().flatten().tolist()
            scale = max(1e-3, math.sqrt(sum(a * a for a in x) / len(x))) if scaled else 1.0
            for i, g in enumerate(gradient):
                m[i] = beta1 * m[i] + (1 - beta1) * g
                v[i] = beta2 * v[i] + (1 - beta2) * g * g
                step = (m[i] / (1 - beta1**t)) / (math.sqrt(v[i] / (1 - beta2**t)) + eps)
                x[i] = x[i] * (1 - rate * decay) - rate * scale * step
        results.append(torch.tensor(x).view_as(value))
    return results


@pytest.mark.parametrize(("name", "scaled"), [("adamw", False), ("adamw_rms", True)])
def test_updates_against_the_reference(name: str, scaled: bool) -> None:
    module = torch.nn.Module()
    for index, value in enumerate(parameters(1)):
        module.register_parameter(f"p{index}", torch.nn.Parameter(value))
    optimizer = build_optimizer(module, OptimizerConfig.model_validate({"name": name}))
    for group in optimizer.param_groups:
        group["lr"], group["weight_decay"] = 0.01, 0.3
    for step in range(1, 7):
        for parameter, gradient in zip(module.parameters(), gradients(step), strict=True):
            parameter.grad = gradient
        optimizer.step()
    expected = reference(parameters(1), 6, 0.01, 0.3, scaled)
    for found, wanted in zip(module.parameters(), expected, strict=True):
        torch.testing.assert_close(found.detach(), wanted, rtol=1e-5, atol=1e-8)


def test_adamw_is_torchs_own() -> None:
    module = torch.nn.Linear(5, 3)
    config = OptimizerConfig(weight_decay=0.2, betas=(0.8, 0.95), eps=1e-7)
    optimizer = build_optimizer(module, config)
    assert isinstance(optimizer, torch.optim.AdamW)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.2, 0.0]
    assert all(group["betas"] == (0.8, 0.95) and group["eps"] == 1e-7 for group in optimizer.param_groups)
    theirs = copy.deepcopy(module)
    reference = torch.optim.AdamW(
        [{"params": [theirs.weight], "weight_decay": 0.2}, {"params": [theirs.bias], "weight_decay": 0.0}],
        lr=0.1, betas=(0.8, 0.95), eps=1e-7, fused=True,
    )  # fmt: skip
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    for _ in range(3):
        for linear, rule in ((module, optimizer), (theirs, reference)):
            linear(torch.linspace(-1, 1, 10).view(2, 5)).square().sum().backward()
            rule.step()
            rule.zero_grad()
    assert torch.equal(module.weight, theirs.weight)
    assert torch.equal(module.bias, theirs.bias)


def test_a_training_process_does_not_load_the_compiler() -> None:
    """It would take nearly 2 s of every rank's start."""
    done = subprocess.run(
        [sys.executable, "-c", _TRAINS], capture_output=True, text=True, timeout=250, check=True
    )
    assert done.stdout.split() == ["False", "False"]


_TRAINS = """
import sys, torch, dist_transformer.engine
from dist_transformer.config import OptimizerConfig
from dist_transformer.engine.optim import build_optimizer
module = torch.nn.Linear(2, 2)
for name in ("adamw", "adamw_rms"):
    optimizer = build_optimizer(module, OptimizerConfig(name=name))
    module(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    optimizer.load_state_dict(optimizer.state_dict())
print("torch._dynamo" in sys.modules, "torch._inductor.compile_fx" in sys.modules)
"""


def test_without_a_gradient_nothing_moves() -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = RMSScaledAdamW([{"params": [parameter], "weight_decay": 0.5}], 0.1, (0.9, 0.98), 1e-9)
    optimizer.step()
    assert torch.equal(parameter.detach(), torch.ones(3))
    assert not optimizer.state


def test_flat_pieces_on_two_ranks_move_as_whole_parameters() -> None:
    """ZeRO's view: all parameters in one flat tensor with padding, cut in the middle of one, a half on each rank."""
    flat = torch.cat([value.flatten() for value in parameters(2)])
    n_padded = 64
    assert flat.numel() < n_padded
    middle = n_padded // 2
    lengths = [value.numel() for value in parameters(2)]
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    assert starts[1] < middle < starts[2] + lengths[2]
    full = torch.cat([flat, torch.zeros(n_padded - flat.numel())])
    halves = [torch.nn.Parameter(full[:middle].clone()), torch.nn.Parameter(full[middle:].clone())]

    def segments(rank: int) -> list[Segment]:
        found = []
        for index, (start, length) in enumerate(zip(starts, lengths, strict=True)):
            low, high = max(start, rank * middle), min(start + length, (rank + 1) * middle)
            if low < high:
                found.append(Segment(low - rank * middle, high - low, index, length))
        return found

    optimizers = [
        RMSScaledAdamW([{"params": [half], "weight_decay": 0.3}], 0.01, (0.9, 0.98), 1e-9) for half in halves
    ]
    for step in range(1, 5):
        squares = torch.zeros(len(lengths))
        for rank, half in enumerate(halves):
            for part in segments(rank):
                piece = half.detach()[part.start : part.start + part.length]
                squares[part.index] += piece.square().sum()
        padded = torch.cat([*[g.flatten() for g in gradients(step)], torch.zeros(n_padded - flat.numel())])
        for rank, (half, optimizer) in enumerate(zip(halves, optimizers, strict=True)):
            half.grad = padded[rank * middle : (rank + 1) * middle].clone()
            # What the other rank holds, added as an all-reduce would.
            mine = torch.zeros(len(lengths))
            for part in segments(rank):
                mine[part.index] += half.detach()[part.start : part.start + part.length].square().sum()
            other = squares - mine

            def all_reduce(values: Tensor, other: Tensor = other) -> None:
                values += other

            optimizer.layouts = {id(half): Layout(segments(rank), len(lengths), all_reduce)}
            optimizer.step()
    found = torch.cat([half.detach() for half in halves])
    expected = reference(parameters(2), 4, 0.01, 0.3, scaled=True)
    torch.testing.assert_close(
        found[: flat.numel()], torch.cat([value.flatten() for value in expected]), rtol=1e-5, atol=1e-8
    )
    assert not found[flat.numel() :].any(), "padding moved"
