"""The same model, step and output on CUDA as on the CPU.

Unrun so far: written without a GPU at hand. Every test is skipped where there is none.
"""

import socket
from typing import Any

import pytest
import torch
from torch import Tensor

from dist_transformer.data.token_ids import PAD_ID
from dist_transformer.engine.engine import Engine
from dist_transformer.generate.search import beam_search
from dist_transformer.model import EncoderDecoder
from dist_transformer.parallel.cross_entropy import linear_cross_entropy
from dist_transformer.parallel.mesh import open_mesh
from tests.dist.test_gradients import Split, config_of, rows_of
from tests.unit.model import small

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: torch finds none here"),
]

DEVICE = "cuda"
PRESETS = small.PRESETS
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


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_training_step(stage: int, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL with one rank: the losses of the first steps fall, and are those of the plain model on the CPU."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    variables = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    for name, value in {**variables, "MASTER_PORT": str(port)}.items():
        monkeypatch.setenv(name, value)
    batch = rows_of(packed=True)
    n_target_tokens = int((batch.decoder_target_tokens != PAD_ID).sum())
    with open_mesh() as mesh:
        assert mesh.device.type == DEVICE
        split = Split(micro_batch_size=8, zero_stage=stage, precision=precision)
        engine = Engine(config_of("modern_small", split, 8), mesh)
        before = float(engine.evaluate_batch(batch).cross_entropy)
        results = [engine.train_step([batch], n_target_tokens, step) for step in (1, 2, 3)]
        assert all(result.applied for result in results)
        losses = [float(result.sums[1]) for result in results]
        assert losses[0] == pytest.approx(before, rel=RELATIVE_BF16)
        assert losses[2] < losses[0]
        assert all(torch.tensor(result.grad_norm).isfinite() for result in results)


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
