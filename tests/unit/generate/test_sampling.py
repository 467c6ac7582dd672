"""Sampling: the distribution, what a sample depends on, and scores."""

import math
from collections import Counter
from typing import Any

import pytest
import torch

from dist_transformer.data.token_ids import EOS_ID, PAD_ID
from dist_transformer.generate.rules import Rules
from dist_transformer.generate.sampling import Distribution, sample
from dist_transformer.generate.search import Hypothesis, beam_search
from dist_transformer.model import EncoderDecoder
from tests.unit.generate.test_search import log_p, log_p_of_next, pad, sources
from tests.unit.generate.trained import trained_model
from tests.unit.model.small import PRESETS, VOCAB

LOG_P = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()


def probabilities(distribution: Distribution) -> list[float]:
    cumulative = distribution.cumulative(LOG_P)
    return (torch.diff(cumulative, prepend=torch.zeros(1, 1)) / cumulative[:, -1:])[0].tolist()


@pytest.mark.parametrize(
    ("distribution", "expected"),
    [
        (Distribution(), [0.4, 0.3, 0.2, 0.1]),
        (Distribution(temperature=0.5), [16 / 30, 9 / 30, 4 / 30, 1 / 30]),
        (Distribution(top_k=2), [4 / 7, 3 / 7, 0, 0]),
        (Distribution(top_k=9), [0.4, 0.3, 0.2, 0.1]),
        (Distribution(top_p=0.69), [4 / 7, 3 / 7, 0, 0]),
        (Distribution(top_p=0.71), [4 / 9, 3 / 9, 2 / 9, 0]),
        (Distribution(top_p=0.01), [1, 0, 0, 0]),
        # Of the three likeliest, the fewest that hold 0.6 of what the three hold.
        (Distribution(top_k=3, top_p=0.6), [4 / 7, 3 / 7, 0, 0]),
    ],
)
def test_distribution(distribution: Distribution, expected: list[float]) -> None:
    assert probabilities(distribution) == pytest.approx(expected, abs=1e-6)


def draw(
    model: EncoderDecoder, rows: list[list[int]], lines: list[int], *, n: int = 3, **options: Any
) -> list[list[Hypothesis]]:
    limits: dict[str, Any] = {"n_vocab": VOCAB, "max_len": 10, **options.pop("rules", {})}
    rules = Rules(model, len(rows), **limits)
    fields = {"n_samples": n, "seed": 7, "length_penalty": 0.0, **options}
    distribution = fields.pop("distribution", Distribution())
    return sample(model, pad(rows), rules, distribution, lines=lines, **fields)


@pytest.mark.parametrize("kind", PRESETS)
def test_a_sample_depends_on_seed_and_line_alone(kind: str) -> None:
    model, rows = trained_model(kind), sources(12)
    together = draw(model, rows, list(range(12)))
    for i in (0, 5, 11):
        [alone] = draw(model, [rows[i]], [i], n=1)
        assert alone[0].tokens == together[i][0].tokens
        assert alone[0].score == pytest.approx(together[i][0].score, rel=1e-4)
    back = draw(model, rows[::-1], list(range(11, -1, -1)), n=5)[::-1]
    assert [[h.tokens for h in found[:3]] for found in back] == [[h.tokens for h in f] for f in together]
    assert [[h.tokens for h in f] for f in draw(model, rows, list(range(12)), seed=8)] != [
        [h.tokens for h in f] for f in together
    ]
    same_line = draw(model, [rows[0]] * 2, [0, 1])
    assert same_line[0] != same_line[1]


@pytest.mark.parametrize("kind", PRESETS)
def test_scores_are_the_models_own(kind: str) -> None:
    model, rows = trained_model(kind), sources(4)
    found = draw(
        model, rows, list(range(4)), distribution=Distribution(temperature=1.5, top_k=20), length_penalty=1.0
    )
    for row, hypotheses in zip(rows, found, strict=True):
        assert len(hypotheses) == 3
        for tokens, score in hypotheses:
            ended = tokens if len(tokens) == 10 else [*tokens, EOS_ID]
            assert score == pytest.approx(log_p(model, row, ended) / len(ended), rel=1e-4)


def test_frequencies_are_the_models() -> None:
    """First tokens of 4,000 samples of one source against the model's distribution: a chi-squared test."""
    model, [row] = trained_model("modern_small"), sources(1, longest=4, seed=3)
    n = 4000
    [found] = draw(model, [row], [0], n=n, rules={"max_len": 1})
    counts = Counter(h.tokens[0] if h.tokens else EOS_ID for h in found)
    p = log_p_of_next(model, row, [])[-1].exp()
    p[PAD_ID] = 0
    p = p / p.sum()
    likely = [i for i in range(VOCAB) if p[i] * n >= 5]
    rest = 1 - float(sum(p[i] for i in likely))
    groups = [(counts[i], float(p[i]) * n) for i in likely]
    groups.append((n - sum(c for c, _ in groups), max(rest * n, 1e-9)))
    statistic = sum((seen - expected) ** 2 / expected for seen, expected in groups if expected > 0.5)
    freedom = len(likely)
    assert freedom >= 3
    assert statistic < freedom + 4 * math.sqrt(2 * freedom)


def test_rules_hold() -> None:
    model, rows = trained_model("vaswani2017_base"), sources(8)
    prefixes = [[5, 6, 7][: i % 4] for i in range(8)]
    found = draw(
        model, rows, list(range(8)), rules={"max_len": [6, 4] * 4, "min_len": 3, "prefixes": prefixes, "n_vocab": 30}
    )  # fmt: skip
    for i, hypotheses in enumerate(found):
        for tokens, _ in hypotheses:
            assert tokens[: len(prefixes[i])] == prefixes[i]
            assert 3 <= len(tokens) <= (6, 4)[i % 2]
            assert all(0 < token < 30 for token in tokens)


def test_nearly_no_temperature_is_greedy() -> None:
    model, rows = trained_model("t5_v1_1_small"), sources(10)
    found = draw(model, rows, list(range(10)), n=1, distribution=Distribution(temperature=1e-4))
    greedy = beam_search(model, pad(rows), beam_size=1, length_penalty=0.0, max_len=10, n_vocab=VOCAB)
    assert [f[0].tokens for f in found] == [g[0].tokens for g in greedy]


def test_a_diverged_model_ends() -> None:
    model = trained_model("vaswani2017_base")
    with torch.no_grad():
        model.decoder.layers[0].feed_forward.up.weight.fill_(math.nan)  # type: ignore[union-attr, operator]
    found = draw(model, sources(3), [0, 1, 2])
    assert [len(hypotheses) for hypotheses in found] == [3, 3, 3]
