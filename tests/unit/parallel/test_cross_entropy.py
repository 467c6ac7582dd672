"""The chunked output projection and loss against torch's own cross-entropy."""

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dist_transformer.parallel import cross_entropy
from dist_transformer.parallel.cross_entropy import TokenLoss, linear_cross_entropy

N_ROWS, D_MODEL, VOCAB = 37, 16, 53


def inputs(dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N_ROWS, D_MODEL, generator=generator, dtype=torch.float64)
    weight = torch.randn(VOCAB, D_MODEL, generator=generator, dtype=torch.float64)
    targets = torch.randint(1, VOCAB, (N_ROWS,), generator=generator)
    targets[::5] = 0  # padding
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), targets


def twins() -> tuple[Tensor, Tensor, Tensor]:
    """Rows of which the second half has the first half's targets."""
    one, weight, targets = inputs()
    other, _, _ = inputs(seed=1)
    hidden = torch.cat([one, other]).detach().requires_grad_()
    return hidden, weight, torch.cat([targets, targets])


def reference(
    hidden: Tensor, weight: Tensor, targets: Tensor, label_smoothing: float, z_loss: float
) -> tuple[Tensor, Tensor]:
    """(objective, cross-entropy), both summed over the targets that count."""
    logits = hidden @ weight.T
    options: dict[str, Any] = {"ignore_index": 0, "reduction": "sum"}
    smoothed = F.cross_entropy(logits, targets, label_smoothing=label_smoothing, **options)
    z_term = (logits.logsumexp(-1).square() * (targets != 0)).sum()
    return smoothed + z_loss * z_term, F.cross_entropy(logits, targets, **options)


def check(loss: TokenLoss, hidden: Tensor, weight: Tensor, expected: Tensor, expected_plain: Tensor) -> None:
    """Values and gradients, in float64."""
    # Not 1: the gradient that arrives from behind must be used.
    d_hidden, d_weight = torch.autograd.grad(3.0 * expected, (hidden, weight))
    (3.0 * loss.objective).backward()
    torch.testing.assert_close(loss.objective, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(loss.cross_entropy, expected_plain, rtol=1e-12, atol=0)
    torch.testing.assert_close(hidden.grad, d_hidden, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(weight.grad, d_weight, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("chunk_rows", [1, 7, 36, 37, 1000])
@pytest.mark.parametrize("cached", [2**18, 300, 10], ids=["one block", "blocks", "single rows"])
@pytest.mark.parametrize(("label_smoothing", "z_loss"), [(0.0, 0.0), (0.1, 0.0), (0.0, 1e-2), (0.1, 1e-2)])
def test_equals_torch(
    label_smoothing: float, z_loss: float, chunk_rows: int, cached: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float64 throughout."""
    monkeypatch.setattr(cross_entropy, "_CACHED", cached)
    hidden, weight, targets = inputs()
    expected, expected_plain = reference(hidden, weight, targets, label_smoothing, z_loss)
    loss = linear_cross_entropy(
        hidden,
        weight,
        targets,
        ignore_id=0,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        chunk_rows=chunk_rows,
    )
    check(loss, hidden, weight, expected, expected_plain)


def twin_reference(
    hidden: Tensor, weight: Tensor, targets: Tensor, label_smoothing: float, z_loss: float, r_drop: float
) -> tuple[Tensor, Tensor]:
    """As the paper has it (R-Drop, equation 3), halved."""
    objective, plain = reference(hidden, weight, targets, label_smoothing, z_loss)
    p, q = (hidden @ weight.T).log_softmax(-1).chunk(2)
    divergence = F.kl_div(q, p, log_target=True, reduction="none") + F.kl_div(
        p, q, log_target=True, reduction="none"
    )
    counts = (targets != 0).chunk(2)[0]
    return (objective + r_drop / 2 * (divergence.sum(-1) * counts).sum()) / 2, plain / 2


@pytest.mark.parametrize("chunk_rows", [1, 7, 36, 1000])
@pytest.mark.parametrize("cached", [2**18, 600, 10], ids=["one block", "blocks", "single pairs"])
@pytest.mark.parametrize(("label_smoothing", "z_loss"), [(0.0, 0.0), (0.1, 1e-2)])
def test_twins_are_drawn_together(
    label_smoothing: float, z_loss: float, chunk_rows: int, cached: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float64 throughout."""
    monkeypatch.setattr(cross_entropy, "_CACHED", cached)
    hidden, weight, targets = twins()
    expected, expected_plain = twin_reference(hidden, weight, targets, label_smoothing, z_loss, r_drop=5.0)
    loss = linear_cross_entropy(
        hidden,
        weight,
        targets,
        ignore_id=0,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        r_drop=5.0,
        chunk_rows=chunk_rows,
    )
    check(loss, hidden, weight, expected, expected_plain)
    is_correct = ((hidden @ weight.T).argmax(-1) == targets) & (targets != 0)
    assert torch.equal(loss.is_correct, is_correct) and loss.n_correct == is_correct.sum() / 2
    assert loss.n_tokens == (targets != 0).sum() / 2


def test_equal_twins_are_the_plain_loss() -> None:
    hidden, weight, targets = inputs()
    plain = linear_cross_entropy(hidden, weight, targets, ignore_id=0, label_smoothing=0.1)
    twice = linear_cross_entropy(
        torch.cat([hidden, hidden]),
        weight,
        torch.cat([targets, targets]),
        ignore_id=0,
        label_smoothing=0.1,
        r_drop=5.0,
    )
    torch.testing.assert_close(twice.objective, plain.objective, rtol=1e-12, atol=0)


def test_half_a_pair_is_refused() -> None:
    with pytest.raises(ValueError, match="37 rows"):
        linear_cross_entropy(*inputs(), ignore_id=0, r_drop=1.0)


def test_counts() -> None:
    hidden, weight, targets = inputs()
    loss = linear_cross_entropy(hidden, weight, targets, ignore_id=0, chunk_rows=10)
    counts = targets != 0
    assert loss.n_tokens == counts.sum()
    is_correct = ((hidden @ weight.T).argmax(-1) == targets) & counts
    assert torch.equal(loss.is_correct, is_correct)
    assert loss.n_correct == is_correct.sum()
    assert not loss.cross_entropy.requires_grad and not loss.n_correct.requires_grad


def test_chunks_do_not_change_the_loss() -> None:
    losses: list[TokenLoss] = []
    for chunk_rows in (3, 37):
        hidden, weight, targets = inputs(torch.float32)
        losses.append(
            linear_cross_entropy(hidden, weight, targets, ignore_id=0, z_loss=1e-4, chunk_rows=chunk_rows)
        )
    for first, second in itertools.pairwise(losses):
        torch.testing.assert_close(first.objective, second.objective, rtol=1e-6, atol=0)


def test_only_ignored_targets_give_zero_and_no_gradient() -> None:
    hidden, weight, targets = inputs(torch.float32)
    loss = linear_cross_entropy(hidden, weight, torch.zeros_like(targets), ignore_id=0, label_smoothing=0.1)
    loss.objective.backward()
    assert loss.objective == 0 and loss.n_tokens == 0
    assert hidden.grad is not None and weight.grad is not None
    assert not hidden.grad.any() and not weight.grad.any()


def test_without_gradient() -> None:
    hidden, weight, targets = inputs(torch.float32)
    with_gradient = linear_cross_entropy(
        hidden, weight, targets, ignore_id=0, label_smoothing=0.1, z_loss=1e-4
    )
    with torch.no_grad():
        without = linear_cross_entropy(hidden, weight, targets, ignore_id=0, label_smoothing=0.1, z_loss=1e-4)
    assert without.objective == with_gradient.objective and not without.objective.requires_grad


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_gradient_of_one_side_only(frozen: str) -> None:
    hidden, weight, targets = inputs(torch.float32)
    expected = torch.autograd.grad(reference(hidden, weight, targets, 0.0, 0.0)[0], (hidden, weight))
    (hidden if frozen == "hidden" else weight).requires_grad_(False)
    linear_cross_entropy(hidden, weight, targets, ignore_id=0).objective.backward()
    trained, d_trained = (weight, expected[1]) if frozen == "hidden" else (hidden, expected[0])
    torch.testing.assert_close(trained.grad, d_trained, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cached", [2**18, 300], ids=["one block", "blocks"])
def test_bf16_is_near_fp32(cached: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The product rounds logits to bf16, so each is off by at most 2^-9 of itself; all else is float32."""
    monkeypatch.setattr(cross_entropy, "_CACHED", cached)
    hidden, weight, targets = inputs(torch.bfloat16)
    hidden32, weight32 = (x.detach().float().requires_grad_() for x in (hidden, weight))
    loss = linear_cross_entropy(hidden, weight, targets, ignore_id=0, label_smoothing=0.1, z_loss=1e-4)
    expected = linear_cross_entropy(
        hidden32, weight32, targets, ignore_id=0, label_smoothing=0.1, z_loss=1e-4
    )
    loss.objective.backward()
    expected.objective.backward()
    largest_logit = (hidden32 @ weight32.T).abs().max()
    # Two logits enter each token's loss: the target's and the normaliser's.
    assert (loss.objective - expected.objective).abs() < 2 * 2**-9 * largest_logit * loss.n_tokens
    assert loss.objective.dtype == torch.float32
    for low, high in ((hidden, hidden32), (weight, weight32)):
        assert low.grad is not None and low.grad.dtype == torch.bfloat16 and high.grad is not None
        # The softmax turns an absolute error of a logit into the same relative one of a probability (at most
        # 2^-9 x 16 here); rounding of both factors and of the result adds 3 x 2^-9.
        error = (low.grad.float() - high.grad).norm() / high.grad.norm()
        assert error < (largest_logit + 3) * 2**-9


class _LargestTensor(TorchDispatchMode):
    """The largest number of elements that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.n_elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, Tensor):
                self.n_elements = max(self.n_elements, tensor.numel())
        return out


def test_a_strong_z_loss_of_small_logits_is_kept() -> None:
    """1 + 2 z log Z, the factor of a row's gradient, may be negative."""
    hidden = torch.full((3, 4), -2.0, dtype=torch.float64, requires_grad=True)
    weight = torch.ones(5, 4, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([1, 2, 3])
    expected, _ = reference(hidden, weight, targets, 0.0, 1.0)
    d_hidden, d_weight = torch.autograd.grad(expected, (hidden, weight))
    linear_cross_entropy(hidden, weight, targets, ignore_id=0, z_loss=1.0).objective.backward()
    torch.testing.assert_close(hidden.grad, d_hidden, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(weight.grad, d_weight, rtol=1e-12, atol=1e-12)


def test_never_more_logits_than_a_chunk() -> None:
    n_rows, chunk_rows, vocab = 512, 16, 300
    hidden = torch.randn(n_rows, 8, requires_grad=True)
    weight = torch.randn(vocab, 8, requires_grad=True)
    targets = torch.randint(1, vocab, (n_rows,))
    with _LargestTensor() as largest:
        loss = linear_cross_entropy(
            hidden, weight, targets, ignore_id=0, label_smoothing=0.1, z_loss=1e-4, chunk_rows=chunk_rows
        )
        loss.objective.backward()
    assert largest.n_elements == chunk_rows * vocab  # n_rows x vocab would be 32 times as many


def test_a_second_backward_pass_is_refused() -> None:
    """Gradients are scaled where they lie: once. Never a wrong one."""
    hidden, weight, targets = inputs()
    objective = linear_cross_entropy(hidden, weight, targets, ignore_id=0).objective
    objective.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        objective.backward()
