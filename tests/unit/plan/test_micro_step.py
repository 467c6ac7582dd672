"""What is read off the model on the meta device, against the same model really run."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dist_transformer.config import Config, build_config
from dist_transformer.model import build_model, initialize
from dist_transformer.model.flops import executed_work, hardware_flops
from dist_transformer.parallel.objective import TrainingModule
from dist_transformer.parallel.recompute import apply_recompute
from dist_transformer.parallel.regions import TensorParallel
from dist_transformer.plan.live_bytes import LiveBytes
from dist_transformer.plan.micro_step import MicroStep, full_rows, run_micro_step

ALONE = TensorParallel(None, 0, 1, sequence=False)  # type: ignore[arg-type]
N_ROWS = 4
KINDS: dict[str, dict[str, Any]] = {
    "vaswani2017_base": {},
    # CPUs have no kernel of RMSNorm, nor of attention with a bias that learns: what they and GPUs have is compared.
    "t5_v1_1_small": {"norm": "layer_norm", "positions": "sinusoidal"},
    "modern_small": {"norm": "layer_norm", "qk_norm": False, "n_kv_heads": 2},
}
POLICIES = ("none", "selective", "every_n", "full")


def config_of(preset: str = "vaswani2017_base", policy: str = "none", **model: Any) -> Config:
    """Wide enough that activations are most of the memory, as they are in training."""
    shape = {"d_model": 64, "d_ff": 128, "n_heads": 4, "n_kv_heads": 4, "head_dim": 16, "vocab_size": 512}
    layers = {"n_encoder_layers": 2, "n_decoder_layers": 2, "dropout": 0.0}
    return build_config(
        {
            "run": {"dir": "unused"},
            "model": {"preset": preset, **shape, **layers, **KINDS.get(preset, {}), **model},
            "data": {"train": "unused", "max_source_len": 64, "max_target_len": 48},
            "train": {
                "steps": 1, "global_batch_size": N_ROWS, "micro_batch_size": N_ROWS, "precision": "fp32",
                "loss_chunk_rows": 100,
            },
            "recompute": {"encoder": policy, "decoder": policy},
        }
    )  # fmt: skip


def real_module(config: Config) -> TrainingModule:
    """With float32 weights on the CPU; gradients go as they come, as in `run_micro_step`."""
    model = build_model(config.model)
    initialize(model, 1, torch.device("cpu"))
    apply_recompute(model, config.recompute)
    module = TrainingModule(model, config.train, ALONE).train()

    def drop(parameter: torch.Tensor) -> None:
        parameter.grad = None

    for parameter in module.parameters():
        parameter.register_post_accumulate_grad_hook(drop)  # type: ignore[no-untyped-call]
    return module


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("preset", KINDS)
def test_memory_is_what_a_real_step_needs(preset: str, policy: str) -> None:
    config = config_of(preset, policy)
    planned = run_micro_step(config, N_ROWS)
    module, rows = real_module(config), full_rows(config, N_ROWS, torch.device("cpu"))
    with LiveBytes("cpu", known=list(module.parameters())) as live:
        loss = module(rows)
        kept, forward_peak = live.now, live.peak
        live.peak = kept
        loss.objective.backward()
    # The CPU's attention keeps its sums in another shape, and its dropout and loss have some bytes of their own.
    assert planned.kept == pytest.approx(kept, rel=0.02)
    assert planned.forward_peak == pytest.approx(forward_peak, rel=0.02)
    assert planned.backward_peak == pytest.approx(live.peak, rel=0.03)


def test_live_bytes_are_the_allocators(tmp_path: Path) -> None:
    """Counted from storages, and reported by torch's CPU allocator to its profiler."""
    config = config_of()
    module, rows = real_module(config), full_rows(config, N_ROWS, torch.device("cpu"))
    module(rows).objective.backward()  # fills what is cached
    inputs = [value for value in vars(rows).values() if isinstance(value, torch.Tensor)]
    with LiveBytes("cpu", grain=1, known=[*module.parameters(), *inputs]) as live:
        module(rows).objective.backward()
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        module(rows).objective.backward()
    profiler.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    changes = [
        event["args"]["Bytes"] for event in sorted(events, key=_time) if event.get("name") == "[memory]"
    ]
    alive, most = 0, 0
    for change in changes:
        alive += change
        most = max(most, alive)
    assert len(changes) > 500
    # Kernels' own scratch memory is seen by the allocator alone.
    assert live.peak <= most < 1.03 * live.peak


def _time(event: dict[str, Any]) -> float:
    return float(event.get("ts", 0))


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("preset", KINDS)
def test_arithmetic_is_what_the_formulas_say(preset: str, policy: str) -> None:
    config = config_of(preset, policy)
    planned = run_micro_step(config, N_ROWS)
    data = config.data
    work = executed_work(N_ROWS, data.max_source_len, data.max_target_len)
    expected = hardware_flops(config.model, work, config.recompute, fused_attention=True)
    assert sum(kernel.flops for kernel in planned.kernels) == pytest.approx(expected, rel=1e-3)
    products = [kernel for kernel in planned.kernels if kernel.kind == "product"]
    assert sum(kernel.n_bytes for kernel in products) < 0.5 * sum(k.n_bytes for k in planned.kernels)


@pytest.mark.parametrize("preset", KINDS)
def test_ranks_that_share_layers_have_their_part(preset: str) -> None:
    whole, part = run_micro_step(config_of(preset), N_ROWS), _of_two_ranks(config_of(preset))
    assert whole.whole == whole.n_parameters == part.whole
    # Norms and biases that all ranks hold are little.
    assert part.n_parameters == pytest.approx(whole.n_parameters / 2, rel=0.05)
    assert part.kept < 0.6 * whole.kept
    sent = [kernel.n_bytes for kernel in part.kernels if kernel.kind == "communication"]
    assert sent and not [kernel for kernel in whole.kernels if kernel.kind == "communication"]
    flops = [sum(kernel.flops for kernel in step.kernels) for step in (part, whole)]
    assert flops[0] == pytest.approx(flops[1] / 2, rel=0.05)


def _of_two_ranks(config: Config, **parallel: Any) -> MicroStep:
    cut = config.parallel.model_copy(update={"tp_degree": 2, **parallel})
    return run_micro_step(config.model_copy(update={"parallel": cut}), N_ROWS)


def test_bytes_between_ranks_are_those_of_whole_rows() -> None:
    """Without sequence parallelism a sum of [B, T, D] for each sublayer and pass, which sends as much as a gather and a
    scatter do with it.
    """
    config = config_of(n_encoder_layers=1, n_decoder_layers=1)
    shared, apart = (_of_two_ranks(config, sequence_parallel=sequence) for sequence in (False, True))
    source = 4 * N_ROWS * config.data.max_source_len * config.model.d_model
    target = 4 * N_ROWS * config.data.max_target_len * config.model.d_model
    sums = [k.n_bytes for k in shared.kernels if k.kind == "communication"]
    # The encoder's two sublayers and embedding; forward, and backward but for the embedding.
    assert sums.count(2 * source) >= 5 and sums.count(2 * target) >= 6
    assert max(sums) == 2 * source
    parts = [k.n_bytes for k in apart.kernels if k.kind == "communication"]
    assert max(parts) == source and parts.count(source) >= 9
    assert sum(parts) == pytest.approx(sum(sums), rel=0.2)


def test_recomputation_takes_memory_and_gives_work() -> None:
    steps = {policy: run_micro_step(config_of(policy=policy), N_ROWS) for policy in POLICIES}
    kept = [steps[policy].kept for policy in ("none", "selective", "full")]
    work = [sum(k.flops for k in steps[policy].kernels) for policy in ("none", "selective", "full")]
    assert kept == sorted(kept, reverse=True) and work == sorted(work)
    assert steps["full"].kept < steps["every_n"].kept < steps["none"].kept


def test_nothing_is_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """The functions that stand in for CUDA's kernels are gone again, after a failure too."""
    before: dict[str, Callable[..., Any]] = {
        name: getattr(torch.nn.functional, name) for name in ("scaled_dot_product_attention", "rms_norm", "dropout")
    }  # fmt: skip
    run_micro_step(config_of(), 1)

    def fail(*_: Any) -> None:
        raise RuntimeError("in the middle")

    monkeypatch.setattr(TrainingModule, "forward", fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        run_micro_step(config_of(), 1)
    assert all(getattr(torch.nn.functional, name) is function for name, function in before.items())
    assert not torch.distributed.is_initialized()


class FromTheHost(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Operations that bring more than a number from the host to the device: from plain memory CUDA waits for them."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        arrived = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor) and x.is_meta]
        if arrived and any(x.device.type == "cpu" and x.dim() for x in tensors):
            self.found.append(str(func))
        return result


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "everything": {"label_smoothing": 0.1, "z_loss": 1e-4, "r_drop": 1.0, "precision": "bf16"},
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("preset", ["vaswani2017_base", "t5_v1_1_small", "modern_small"])
def test_the_host_never_waits_for_the_device(preset: str, policy: str, options: str) -> None:
    """A number that the host reads, or a shape that depends on one, would fail here: on meta there are no numbers."""
    config = config_of(preset, policy, dropout=0.1)
    config = config.model_copy(update={"train": config.train.model_copy(update=OPTIONS[options])})
    run_micro_step(config, N_ROWS)  # what is made once, such as tables of positions
    with FromTheHost() as copies:
        run_micro_step(config, N_ROWS)
    assert not copies.found


def test_waiting_would_be_noticed() -> None:
    number = torch.ones(1, device="meta")
    with pytest.raises(RuntimeError):
        number.item()
    with pytest.raises((RuntimeError, NotImplementedError)):
        number.nonzero()
    with FromTheHost() as copies:
        torch.ones(3).to("meta")
    assert copies.found
