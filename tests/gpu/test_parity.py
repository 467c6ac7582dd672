"""The same model, step and output on CUDA as on the CPU.

Unrun so far: written without a GPU at hand. Every test is skipped where there is none.
"""

import math
import socket
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dist_transformer.data.token_ids import PAD_ID
from dist_transformer.engine.engine import Engine
from dist_transformer.generate.search import beam_search
from dist_transformer.model import EncoderDecoder, build_model, initialize
from dist_transformer.parallel.cross_entropy import linear_cross_entropy
from dist_transformer.parallel.mesh import Mesh, open_mesh
from dist_transformer.parallel.objective import TrainingModule
from dist_transformer.parallel.regions import TensorParallel
from tests.dist.test_gradients import Split, config_of, rows_of
from tests.unit.model import small

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: torch finds none here"),
]

DEVICE = "cuda"
PRESETS = small.PRESETS
FUSED = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)
RELATIVE_BF16 = 2e-2
PACKS = [small.random_samples(3, seed=row) for row in range(4)]


def loss_and_gradients(model: EncoderDecoder, device: str) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss a target token, and gradients, of packed rows."""
    model = model.to(device).train()
    inputs = {name: value.to(device) for name, value in small.rows_of(PACKS).items()}
    targets = inputs.pop("targets").flatten()
    hidden = model(**inputs).flatten(0, 1)
    found = linear_cross_entropy(hidden, model.output_weight, targets, ignore_id=PAD_ID)
    loss = found.objective / found.n_tokens
    loss.backward()  # type: ignore[no-untyped-call]
    gradients = {name: p.grad.float().cpu() for name, p in model.named_parameters() if p.grad is not None}
    return loss.detach().float().cpu(), gradients


@pytest.mark.parametrize("preset", PRESETS)
def test_bf16_on_cuda_is_fp32_on_the_cpu(preset: str) -> None:
    expected, expected_gradients = loss_and_gradients(small.small_model(preset, noise=0.02), "cpu")
    model = small.small_model(preset, torch.bfloat16, noise=0.02)
    loss, gradients = loss_and_gradients(model, DEVICE)
    torch.testing.assert_close(loss, expected, rtol=RELATIVE_BF16, atol=0)
    # bf16 rounds each product: single small gradients may be off by more, all of them together are not.
    mine, others = (
        torch.cat([found[name].flatten() for name in expected_gradients])
        for found in (gradients, expected_gradients)
    )
    assert (mine - others).norm() < 5 * RELATIVE_BF16 * others.norm()


@pytest.mark.parametrize("preset", PRESETS)
def test_fp32_on_cuda_is_fp32_on_the_cpu(preset: str) -> None:
    expected, expected_gradients = loss_and_gradients(small.small_model(preset, noise=0.02), "cpu")
    loss, gradients = loss_and_gradients(small.small_model(preset, noise=0.02), DEVICE)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=0)
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-2, atol=1e-4, msg=name)


@pytest.mark.parametrize("target_len", [128, 114])
@pytest.mark.parametrize("preset", PRESETS)
def test_attention_is_a_fused_kernels(preset: str, target_len: int) -> None:
    """Forward and backward in bf16, of widths and lengths as they are trained: SDPA raises where it has no kernel."""
    shape = {"d_model": 256, "n_heads": 4, "head_dim": 64, "n_encoder_layers": 1, "n_decoder_layers": 1}
    model = small.small_model(preset, torch.bfloat16, noise=0.0, **shape).to(DEVICE).train()
    packs = [small.random_samples(12, seed=row) for row in range(2)]
    inputs = {name: value.to(DEVICE) for name, value in small.rows_of(packs, 512, target_len).items()}
    inputs.pop("targets")
    with sdpa_kernel([*FUSED]):
        model(**inputs).square().sum().backward()
        with torch.no_grad():
            model(**inputs)
    # What projects to the vocabulary, where that is a matrix of its own, is not part of this.
    assert all(p.grad is not None for name, p in model.named_parameters() if not name.startswith("output."))


@pytest.fixture
def mesh(monkeypatch: pytest.MonkeyPatch) -> Iterator[Mesh]:
    """One rank, with NCCL."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    variables = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    for name, value in {**variables, "MASTER_PORT": str(port)}.items():
        monkeypatch.setenv(name, value)
    with open_mesh() as opened:
        assert opened.device.type == DEVICE
        yield opened


def first_steps(split: Split, mesh: Mesh, preset: str, **model: Any) -> tuple[list[float], list[float]]:
    """Cross-entropy sums and gradient norms of three updates on the same rows."""
    batch = rows_of(packed=True)
    engine = Engine(config_of(preset, split, 8, **model), mesh)
    n_target_tokens = int((batch.decoder_target_tokens != PAD_ID).sum())
    results = [engine.train_step([batch], n_target_tokens, step) for step in (1, 2, 3)]
    assert all(result.applied for result in results)
    return [float(result.sums[1]) for result in results], [result.grad_norm for result in results]


@pytest.mark.parametrize("preset", ["modern_small", "t5_v1_1_small"])
@pytest.mark.parametrize(("precision", "relative"), [("fp32", 1e-4), ("bf16", RELATIVE_BF16)])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_training_steps(stage: int, precision: str, relative: float, preset: str, mesh: Mesh) -> None:
    """The first loss is that of the plain model on the CPU, and the next ones fall."""
    split = Split(micro_batch_size=8, zero_stage=stage, precision=precision)
    losses, norms = first_steps(split, mesh, preset)
    config = config_of(preset, split, 8)
    model = build_model(config.model)
    initialize(model, config.run.seed, torch.device("cpu"))
    batch = rows_of(packed=True)
    with torch.no_grad():
        plain = TrainingModule(model, config.train, TensorParallel.of(mesh, False)).eval()(batch)
    assert losses[0] == pytest.approx(float(plain.cross_entropy), rel=relative)
    assert losses[2] < losses[0]
    assert all(math.isfinite(norm) for norm in norms)


@pytest.mark.parametrize("preset", ["modern_small", "t5_v1_1_small"])
@pytest.mark.parametrize(("compiled", "recompute"), [(False, "none"), (True, "none"), (False, "full")])
@pytest.mark.parametrize(("precision", "relative"), [("fp32", 1e-4), ("bf16", RELATIVE_BF16)])
def test_flex_attention_changes_nothing(
    precision: str, relative: float, compiled: bool, recompute: str, preset: str, mesh: Mesh
) -> None:
    """By itself, inside compiled layers, and recomputed; with T5's bias, which learns through it."""
    torch.compiler.reset()
    plain = Split(zero_stage=1, precision=precision, recompute=recompute)
    flex = replace(plain, attention="flex", compile=compiled)
    (losses, norms), (expected_losses, expected_norms) = (
        # Its kernels are made for heads of at least 16.
        first_steps(split, mesh, preset, head_dim=16)
        for split in (flex, plain)
    )
    assert losses == pytest.approx(expected_losses, rel=relative)
    assert norms == pytest.approx(expected_norms, rel=5 * relative)


@pytest.mark.parametrize("preset", PRESETS)
def test_gradients_through_flex_attention(preset: str) -> None:
    """In float32, of rows as they are trained: its kernels round products to fewer bits than float32 has."""
    shape = {"d_model": 256, "n_heads": 4, "head_dim": 64, "n_encoder_layers": 1, "n_decoder_layers": 1}
    packs = [small.random_samples(12, seed=row) for row in range(2)]
    inputs = {name: value.to(DEVICE) for name, value in small.rows_of(packs, 512, 114).items()}
    is_target = inputs.pop("targets") != PAD_ID
    found = []
    for kernel in ("flex", "sdpa"):
        model = small.small_model(preset, noise=0.02, **shape).to(DEVICE).train()
        for stack in (model.encoder, model.decoder):
            stack.kernel = kernel  # type: ignore[assignment]
        model(**inputs)[is_target].square().sum().backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    of_flex, expected = found
    assert set(of_flex) == set(expected)
    total = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    for name, gradient in expected.items():
        assert (of_flex[name] - gradient).norm() < RELATIVE_BF16 * gradient.norm().clamp(min=1e-3 * total), (
            name
        )


@pytest.mark.parametrize("policy", ["selective", "full"])
def test_recomputing_changes_nothing(policy: str, mesh: Mesh) -> None:
    kept, recomputed = (
        first_steps(Split(zero_stage=1, precision="bf16", recompute=recompute), mesh, "modern_small")
        for recompute in ("none", policy)
    )
    for found, expected in zip(recomputed, kept, strict=True):
        assert found == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("preset", PRESETS)
def test_generation_is_the_cpus(preset: str) -> None:
    model = small.small_model(preset)
    sources = torch.zeros(4, 9, dtype=torch.int64)
    for row, (source, _) in enumerate(small.random_samples(4, seed=3)):
        sources[row, : len(source)] = torch.tensor(source)
    options: dict[str, Any] = {"beam_size": 3, "length_penalty": 1.0, "max_len": 8, "n_vocab": small.VOCAB}
    expected = beam_search(model, sources, **options)
    found = beam_search(model.to(DEVICE), sources.to(DEVICE), **options)
    assert [[h.tokens for h in row] for row in found] == [[h.tokens for h in row] for row in expected]
