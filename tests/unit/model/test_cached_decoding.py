"""Decoding with the key-value cache equals computing everything anew."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from dist_transformer.model import EncoderDecoder
from dist_transformer.model.cache import KeyValueCache
from tests.unit.model.small import KINDS, VOCAB, small_model

N_ROWS, N_SOURCE, N_TARGET = 3, 7, 9


def padded_sources() -> Tensor:
    tokens = torch.randint(2, VOCAB, (N_ROWS, N_SOURCE), generator=torch.Generator().manual_seed(1))
    return tokens * (torch.arange(N_SOURCE) < torch.tensor([7, 3, 5])[:, None])


def targets() -> Tensor:
    tokens = torch.randint(2, VOCAB, (N_ROWS, N_TARGET), generator=torch.Generator().manual_seed(2))
    tokens[:, 0] = 0
    return tokens


def recompute(model: EncoderDecoder, source_BS: Tensor, tokens_BT: Tensor) -> Tensor:
    positions = torch.arange(64)
    hidden = model(
        source_BS,
        (source_BS != 0).int(),
        positions[: source_BS.shape[1]].expand_as(source_BS),
        tokens_BT,
        torch.ones_like(tokens_BT),
        positions[: tokens_BT.shape[1]].expand_as(tokens_BT),
    )
    return model.logits(hidden)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_equals_recomputation(kind: str) -> None:
    model, source, tokens = small_model(kind, torch.float64), padded_sources(), targets()
    expected = recompute(model, source, tokens)
    assert expected.std() > 0.1
    for steps in ([1] * N_TARGET, [N_TARGET], [4, 1, 3, 1]):
        cache = model.start(source)
        parts = [model.step(part, cache) for part in tokens.split(steps, dim=1)]
        torch.testing.assert_close(torch.cat(parts, dim=1), expected, rtol=1e-10, atol=1e-10)
        assert cache.length == N_TARGET


def products_depend_on_their_rows_only() -> bool:
    """Whether a row of a matrix product is the same, bit for bit, with 4 rows and with more; and with 16 columns."""
    generator = torch.Generator().manual_seed(5)
    a, b = (torch.randn(3, 40, n, generator=generator) for n in (32, 64))
    of_rows = [torch.equal(a[0, :n] @ b[0, :32], (a[0] @ b[0, :32])[:n]) for n in (4, 5, 12)]
    keys = b[:, :, :32].transpose(1, 2)
    of_keys = [torch.equal(torch.bmm(a, keys[:, :, :n]), torch.bmm(a, keys)[:, :, :n]) for n in (16, 17, 30)]
    return all(of_rows) and all(of_keys)


@pytest.fixture
def one_thread() -> Iterator[None]:
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("n_hypotheses", [1, 3])
@pytest.mark.parametrize("kind", [*(kind for kind in KINDS if kind.startswith("positions_")), "modern_small"])
@torch.no_grad()
def test_equals_recomputation_bit_for_bit(kind: str, n_hypotheses: int) -> None:
    """Every position scheme in fp32: each step from the cache, and from all tokens so far without one.

    From four rows a thread on, and with widths that processors' vectors divide: fewer rows are other products.
    """
    if not products_depend_on_their_rows_only():
        pytest.skip("on this processor a matrix product's rounding depends on its size")
    model, n_tokens = small_model(kind, d_ff=64), 24
    generator = torch.Generator().manual_seed(6)
    source = torch.randint(2, VOCAB, (5, N_SOURCE), generator=generator)
    source[1, 4:] = 0
    tokens = torch.randint(2, VOCAB, (5 * n_hypotheses, n_tokens), generator=generator)

    def start() -> KeyValueCache:
        cache = model.start(source)
        cache.branch(torch.zeros(5, n_hypotheses, dtype=torch.int64))
        return cache

    cache = start()
    for length in range(1, n_tokens + 1):
        cached = model.step(tokens[:, length - 1 : length], cache)[:, -1]
        anew = model.step(tokens[:, :length], start())[:, -1]
        if n_hypotheses == 1:
            assert torch.equal(cached, anew), length
        else:  # slots lie in another order, so that sums are in another order too
            torch.testing.assert_close(cached, anew, rtol=0, atol=16 * 2**-23 * float(anew.abs().max()))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.startswith("positions_")])
@torch.no_grad()
def test_equals_recomputation_in_fp32(kind: str) -> None:
    """Every position scheme, to the last few bits.

    Not bit for bit: training's attention is another kernel, and a matrix product of three rows adds in another order
    than that of 27. What is left is the rounding of some hundred additions: at most 16 units in the last place of
    the largest score (3 to 7 seen).
    Recomputing is itself 4 to 10 units
    from the scores in float64, and cached decoding no further.
    """
    model, source, tokens = small_model(kind), padded_sources(), targets()
    expected = recompute(model, source, tokens)
    exact = recompute(small_model(kind, torch.float64), source, tokens)
    unit = torch.finfo(torch.float32).eps * float(expected.abs().max())
    for steps in ([1] * N_TARGET, [N_TARGET], [4, 1, 3, 1]):
        cache = model.start(source)
        found = torch.cat([model.step(part, cache) for part in tokens.split(steps, dim=1)], dim=1)
        assert (found - expected).abs().max() <= 16 * unit
        # As near to the exact scores as recomputing is.
        assert (found - exact).abs().max() <= 16 * unit
        assert (expected - exact).abs().max() <= 16 * unit
        assert torch.equal(found.argmax(dim=-1), expected.argmax(dim=-1))


@pytest.mark.parametrize("kind", ["vaswani2017_base", "t5_v1_1_small", "modern_small", "widths_rotary_pre"])
@torch.no_grad()
def test_hypotheses_are_reordered_and_sources_dropped(kind: str) -> None:
    """The bookkeeping of a beam search: repeat, reorder within a source, drop a source, reorder again."""
    model, source, tokens = small_model(kind, torch.float64), padded_sources(), targets()
    cache = model.start(source)
    model.step(tokens[:, :2], cache)
    cache.branch(torch.zeros(N_ROWS, 2, dtype=torch.int64))
    # rows: source 0 twice, source 1 twice, source 2 twice
    history = tokens[:, :2].repeat_interleave(2, dim=0)
    new = torch.tensor([[3], [4], [5], [6], [7], [8]])
    model.step(new, cache)
    history = torch.cat([history, new], dim=1)

    cache.branch(torch.tensor([[1, 0], [0, 0], [1, 0]]))
    history = history[torch.tensor([1, 0, 2, 2, 5, 4])]
    new = torch.tensor([[9], [10], [11], [12], [13], [14]])
    logits = model.step(new, cache)[:, -1]
    history = torch.cat([history, new], dim=1)
    expected = recompute(model, source.repeat_interleave(2, dim=0), history)[:, -1]
    torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-10)

    cache.branch(torch.tensor([[1, 1], [0, 1], [0, 0]]))
    sources = torch.tensor([2, 0])
    cache.keep(sources)
    assert cache.n_sources == 2 and cache.layers[0].n_slots == 4  # of 2 + 2 x 2: dead branches are gone
    history = history[torch.tensor([4, 4, 1, 1])]
    for token in (15, 16):
        new = torch.full((4, 1), token) + torch.arange(4)[:, None]
        logits = model.step(new, cache)[:, -1]
        history = torch.cat([history, new], dim=1)
        expected = recompute(model, source[sources].repeat_interleave(2, dim=0), history)[:, -1]
        torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", ["positions_relative_bias", "grouped_query_rotary"])
@torch.no_grad()
def test_several_tokens_of_several_hypotheses(kind: str) -> None:
    """All new tokens of a source are queries of one attention; their order must survive."""
    model, source, tokens = small_model(kind, torch.float64), padded_sources(), targets()
    cache = model.start(source)
    cache.branch(torch.zeros(N_ROWS, 2, dtype=torch.int64))
    tokens = torch.cat([tokens, tokens.flip(1)]).view(2, N_ROWS, -1).transpose(0, 1).reshape(2 * N_ROWS, -1)
    logits = torch.cat([model.step(part, cache) for part in tokens.split([4, 5], dim=1)], dim=1)
    expected = recompute(model, source.repeat_interleave(2, dim=0), tokens)
    torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_a_long_beam_is_cleared_on_the_way() -> None:
    """Random parents for 60 steps: what is kept grows with the live tree, not with steps x hypotheses."""
    model, source = small_model("modern_small", torch.float64), padded_sources()
    generator = torch.Generator().manual_seed(0)
    cache, n_hypotheses = model.start(source), 4
    cache.branch(torch.zeros(N_ROWS, n_hypotheses, dtype=torch.int64))
    history = torch.zeros(N_ROWS * n_hypotheses, 0, dtype=torch.int64)
    for _ in range(60):
        new = torch.randint(2, VOCAB, (N_ROWS * n_hypotheses, 1), generator=generator)
        logits = model.step(new, cache)[:, -1]
        history = torch.cat([history, new], dim=1)
        parents = torch.randint(n_hypotheses, (N_ROWS, n_hypotheses), generator=generator)
        cache.branch(parents)
        rows = (torch.arange(N_ROWS)[:, None] * n_hypotheses + parents).flatten()
        expected = recompute(model, source.repeat_interleave(n_hypotheses, dim=0), history)[:, -1]
        torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)
        history = history[rows]
    assert cache.layers[0].n_slots < 60 * n_hypotheses / 1.5
