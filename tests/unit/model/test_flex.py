"""FlexAttention's masks and biases by its plain formula, which torch runs on CPUs; its kernels are tested on GPUs."""

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.nn.attention import flex_attention as torch_flex

from dist_transformer.config import RecomputeConfig
from dist_transformer.errors import ConfigError
from dist_transformer.model import EncoderDecoder, flex
from dist_transformer.model.flex import FlexMask
from dist_transformer.parallel import compile as compile_module
from dist_transformer.parallel.compile import use_flex_attention
from dist_transformer.parallel.recompute import apply_recompute
from tests.unit.model import small


@pytest.fixture(autouse=True)
def _plain_formula(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Also with a backward pass, which torch has of the formula, and refuses on CPUs as slow."""
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *_: None)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*flex_attention.*without torch.compile.*")
        yield


def model_of(kind: str, kernel: str) -> EncoderDecoder:
    model = small.small_model(kind, torch.float64, noise=0.3).train()
    for stack in (model.encoder, model.decoder):
        stack.kernel = kernel  # type: ignore[assignment]
    return model


def run(model: EncoderDecoder) -> tuple[Tensor, dict[str, Tensor]]:
    """Hidden states of the real target positions, and all gradients, of packed rows with padding at their ends."""
    inputs = small.rows_of([small.random_samples(3, seed=row) for row in range(3)] + [[]])
    targets = inputs.pop("targets")
    hidden = model(**inputs)[targets != 0]
    (hidden * torch.linspace(-1, 1, hidden.numel()).view_as(hidden)).sum().backward()  # type: ignore[no-untyped-call]
    return hidden.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def compare(kind: str, model: EncoderDecoder) -> None:
    (hidden, gradients), (expected, expected_gradients) = run(model), run(model_of(kind, "sdpa"))
    torch.testing.assert_close(hidden, expected, rtol=1e-11, atol=1e-11)
    assert set(gradients) == set(expected_gradients)
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-10, atol=1e-10, msg=name)


@pytest.mark.parametrize(
    "kind", [*small.PRESETS, "multi_query", "grouped_query_relative_bias", "widths_rotary_pre"]
)
def test_a_whole_model_is_what_it_is_with_sdpa(kind: str) -> None:
    compare(kind, model_of(kind, "flex"))


def trace(model: EncoderDecoder, by_layer: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, the kernel by itself or with its layer, up to the last stage of the compiler."""
    torch.compiler.reset()
    options: dict[str, Any] = {"dynamic": False, "fullgraph": True, "backend": "aot_eager"}
    if by_layer:
        for layer in (*model.encoder.layers, *model.decoder.layers):
            layer.forward = torch.compile(layer.forward, **options)
    else:
        traced = torch.compile(torch_flex.flex_attention, **options)
        monkeypatch.setattr(flex, "_kernel", lambda device: traced)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("by_layer", [False, True])
@pytest.mark.parametrize("preset", ["t5_v1_1_small", "modern_small"])
def test_a_traced_kernel_loses_no_gradient(
    preset: str, by_layer: bool, recompute: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Recomputed too, where torch 2.13's plain formula has no gradient of a bias, but whatever stands in memory."""
    model = model_of(preset, "flex")
    trace(model, by_layer, monkeypatch)
    if recompute:
        apply_recompute(model, RecomputeConfig(encoder="full", decoder="every_n", every=2))
    compare(preset, model)


@pytest.mark.parametrize("by_layer", [False, True])
def test_new_rows_are_no_new_program(by_layer: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """One for each stack's layers, or for each of three attentions: masks are made anew, and not compiled anew."""
    model = model_of("t5_v1_1_small", "flex")
    trace(model, by_layer, monkeypatch)
    counters["stats"].clear()
    for seed in range(3):
        packs = [small.random_samples(3, seed=10 * seed + row) for row in range(2)]
        inputs = small.rows_of(packs, 40, 32)
        inputs.pop("targets")
        model(**inputs).sum().backward()
        assert counters["stats"]["unique_graphs"] == (2 if by_layer else 3)


def test_evaluation_and_decoding_keep_sdpa(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("t5_v1_1_small", "flex").eval()
    monkeypatch.setattr(FlexMask, "__init__", lambda *_: pytest.fail("FlexAttention"))
    inputs = small.rows_of([small.random_samples(3, seed=1)])
    inputs.pop("targets")
    model(**inputs)
    model.step(torch.zeros(1, 1, dtype=torch.long), model.start(inputs["encoder_input_tokens"]))
    with pytest.raises(pytest.fail.Exception, match="FlexAttention"):
        model.train()(**inputs)


@pytest.mark.parametrize("causal", [False, True])
def test_blocks_without_a_pair_are_left_out(causal: bool) -> None:
    """Three samples of 128: of nine blocks of pairs three are left, none of them whole where later keys are hidden."""
    segments = torch.arange(1, 4).repeat_interleave(128)[None]
    blocks = FlexMask(segments, segments, causal, None).blocks
    assert blocks.kv_num_blocks.tolist() == [[[int(causal)] * 3]]
    assert blocks.full_kv_num_blocks is not None
    assert blocks.full_kv_num_blocks.tolist() == [[[int(not causal)] * 3]]
    assert blocks.to_dense()[0, 0].equal(torch.eye(3, dtype=torch.int32))


def test_padding_sees_nothing_and_gives_nothing() -> None:
    segments = torch.tensor([[1, 1, 2, 0], [0, 0, 0, 0]])
    q, k, v = torch.randn(3, 2, 4, 4, 8).unbind()
    heads = FlexMask(segments, segments, False, None).attend(q, k, v, 0.5)
    assert heads[0, :, :3].abs().min() > 0
    assert not heads[0, :, 3].any() and not heads[1].any()


def test_what_it_needs_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("modern_small", "sdpa")
    with pytest.raises(ConfigError, match=r"train\.attention=flex needs a GPU"):
        use_flex_attention(model, torch.device("cpu"))
    monkeypatch.setattr(compile_module.shutil, "which", lambda name: None)
    with pytest.raises(ConfigError, match=r"train\.attention=flex needs a C\+\+ compiler"):
        use_flex_attention(model, torch.device("cuda"))
    monkeypatch.setattr(compile_module, "missing_tool", lambda: None)
    use_flex_attention(model, torch.device("cuda"))
    assert (model.encoder.kernel, model.decoder.kernel) == ("flex", "flex")
