"""Forced prefixes and length limits in greedy and beam search."""

from typing import Any

import pytest
import torch

from dist_transformer.data.token_ids import EOS_ID, PAD_ID
from dist_transformer.generate.rules import Rules
from dist_transformer.generate.search import beam_search
from tests.unit.generate.test_search import huggingface_twin, log_p, pad, sources
from tests.unit.generate.trained import trained_model
from tests.unit.model.small import PRESETS, VOCAB, small_model

PREFIXES = [[], [5], [5, 9, 7], [8, 8, 8, 8, 8], [3, 2], []]


@pytest.mark.parametrize("kind", PRESETS)
@pytest.mark.parametrize("beam_size", [1, 4])
def test_prefixes_of_different_lengths_in_one_batch(kind: str, beam_size: int) -> None:
    model, rows = trained_model(kind), sources(6)
    options: dict[str, Any] = {
        "beam_size": beam_size, "length_penalty": 0.7, "max_len": 10, "n_vocab": VOCAB, "n_best": beam_size,
    }  # fmt: skip
    together = beam_search(model, pad(rows), prefixes=PREFIXES, **options)
    free = beam_search(model, pad(rows), **options)
    for i, (row, prefix) in enumerate(zip(rows, PREFIXES, strict=True)):
        [alone] = beam_search(model, pad([row]), prefixes=[prefix], **options)
        assert [h.tokens for h in together[i]] == [h.tokens for h in alone]
        assert len({tuple(h.tokens) for h in alone}) == beam_size
        for tokens, score in together[i]:
            assert tokens[: len(prefix)] == prefix
            ended = tokens if len(tokens) == 10 else [*tokens, EOS_ID]
            assert score == pytest.approx(log_p(model, row, ended) / len(ended) ** 0.7, rel=1e-4)
        assert (not prefix) <= ([h.tokens for h in together[i]] == [h.tokens for h in free[i]])


def test_forcing_what_it_says_anyway_changes_nothing() -> None:
    model, rows = trained_model("modern_small"), sources(10)
    options: dict[str, Any] = {"beam_size": 1, "length_penalty": 1.0, "max_len": 12, "n_vocab": VOCAB}
    free = beam_search(model, pad(rows), **options)
    prefixes = [found[0].tokens[:3] for found in free]
    forced = beam_search(model, pad(rows), prefixes=prefixes, **options)
    assert [f[0].tokens for f in forced] == [f[0].tokens for f in free]
    assert [f[0].score for f in forced] == pytest.approx([f[0].score for f in free], rel=1e-5)


@pytest.mark.parametrize("beam_size", [1, 4])
def test_a_forbidden_token_may_be_forced(beam_size: int) -> None:
    model, rows = trained_model("modern_small"), sources(3)
    found = beam_search(
        model, pad(rows), beam_size=beam_size, length_penalty=1.0, max_len=8, n_vocab=VOCAB,
        forbidden=(2,), prefixes=[[2], [2, 3], []],
    )  # fmt: skip
    assert [h[0].tokens[:1] == [2] for h in found] == [True, True, False]
    assert all(2 not in h[0].tokens[1:] for h in found)


@pytest.mark.parametrize("kind", ["t5_v1_1_small", "vaswani2017_base"])
def test_prefixes_equal_huggingface(kind: str) -> None:
    """Hugging Face leaves the prefix out of the score: without a length penalty the ranking is the same."""
    theirs, ours = huggingface_twin(kind)
    rows = sources(20)
    source, prefix = pad(rows), [5, 9]
    expected = theirs.generate(  # type: ignore[operator]
        input_ids=source,
        attention_mask=(source != PAD_ID).long(),
        decoder_input_ids=torch.tensor([[PAD_ID, *prefix]]).expand(len(rows), -1),
        num_beams=4,
        length_penalty=0.0,
        early_stopping=False,
        max_new_tokens=10,
        suppress_tokens=[PAD_ID],
        do_sample=False,
        return_dict_in_generate=True,
        output_scores=True,
    )
    found = beam_search(
        ours, source, beam_size=4, length_penalty=0.0, max_len=12, n_vocab=VOCAB, prefixes=[prefix] * len(rows)
    )  # fmt: skip
    for row, [hypothesis], tokens, score in zip(
        rows, found, expected.sequences[:, 1:].tolist(), expected.sequences_scores.tolist(), strict=True
    ):
        end = next((i for i, token in enumerate(tokens) if token in (EOS_ID, PAD_ID)), len(tokens))
        assert hypothesis.tokens == tokens[:end]
        assert hypothesis.score == pytest.approx(score + log_p(ours, row, prefix), rel=1e-4)


@pytest.mark.parametrize("beam_size", [1, 5])
def test_limits_of_each_source(beam_size: int) -> None:
    model, rows = trained_model("vaswani2017_base"), sources(12)
    limits = [1 + i % 5 for i in range(12)]
    options: dict[str, Any] = {"beam_size": beam_size, "length_penalty": 1.0, "n_vocab": VOCAB}
    together = beam_search(model, pad(rows), max_len=limits, **options)
    for row, limit, [hypothesis] in zip(rows, limits, together, strict=True):
        [[alone]] = beam_search(model, pad([row]), max_len=limit, **options)
        assert hypothesis.tokens == alone.tokens
        assert len(hypothesis.tokens) <= limit
    assert any(len(h[0].tokens) == limit for h, limit in zip(together, limits, strict=True))


@pytest.mark.parametrize("beam_size", [1, 5])
def test_min_len(beam_size: int) -> None:
    model, rows = trained_model("vaswani2017_base"), sources(12, longest=4)
    options: dict[str, Any] = {
        "beam_size": beam_size, "length_penalty": 1.0, "max_len": 14, "n_vocab": VOCAB, "n_best": beam_size,
    }  # fmt: skip
    free = beam_search(model, pad(rows), **options)
    longer = beam_search(model, pad(rows), min_len=7, **options)
    assert min(len(h.tokens) for found in free for h in found) < 7
    assert min(len(h.tokens) for found in longer for h in found) >= 7
    assert any(len(h.tokens) < 14 for found in longer for h in found)


def test_wrong_arguments() -> None:
    model = small_model("vaswani2017_base")
    with pytest.raises(ValueError, match="a prefix of 4 tokens leaves no room below max_len=4"):
        Rules(model, 1, n_vocab=VOCAB, max_len=4, prefixes=[[2, 3, 4, 5]])
