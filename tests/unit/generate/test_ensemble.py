"""Models that decode together: their probabilities' mean, through the same search."""

import math
from typing import Any

import pytest
import torch

from dist_transformer.config import GenerateConfig
from dist_transformer.data.token_ids import EOS_ID
from dist_transformer.generate.ensemble import Ensemble
from dist_transformer.generate.search import beam_search
from dist_transformer.generate.text import search_sources
from tests.unit.generate.test_search import log_p_of_next, pad, sources
from tests.unit.generate.trained import trained_model
from tests.unit.model.small import VOCAB, small_model

OPTIONS: dict[str, Any] = {"beam_size": 4, "n_best": 4, "length_penalty": 0.6, "max_len": 8, "n_vocab": VOCAB}


def test_scores_are_those_of_the_mean_probability() -> None:
    """Of models of different kinds, whose hypotheses are reordered and whose sources end at different steps."""
    models = [trained_model(kind) for kind in ("vaswani2017_base", "t5_v1_1_small", "modern_small")]
    rows = sources(12)
    together = beam_search(Ensemble(models), pad(rows), **OPTIONS)
    alone = [beam_search(model, pad(rows), **OPTIONS) for model in models]
    assert all(together != outputs for outputs in alone)
    for row, hypotheses in zip(rows, together, strict=True):
        for tokens, score in hypotheses:
            ended = tokens if len(tokens) == 8 else [*tokens, EOS_ID]
            steps = torch.stack([log_p_of_next(model, row, ended[:-1]) for model in models])
            mean = steps.logsumexp(0) - math.log(3)
            expected = float(sum(mean[i, token] for i, token in enumerate(ended))) / len(ended) ** 0.6
            assert score == pytest.approx(expected, rel=1e-4)


def test_of_one_model_twice_it_is_that_model() -> None:
    model, rows = trained_model("modern_small"), sources(12)
    twice, once = (beam_search(m, pad(rows), **OPTIONS) for m in (Ensemble([model, model]), model))
    for found, expected in zip(twice, once, strict=True):
        assert [h.tokens for h in found] == [h.tokens for h in expected]
        assert [h.score for h in found] == pytest.approx([h.score for h in expected], rel=1e-5)


def test_a_search_leaves_the_models_without_dropout() -> None:
    models = [small_model("vaswani2017_base", torch.float32, dropout=0.5).eval() for _ in "12"]
    config = GenerateConfig(beam_size=2, max_len=4)
    search_sources(Ensemble(models), [[2, 3]], config, n_vocab=VOCAB, max_source_len=8, max_target_len=8)
    assert not any(module.training for model in models for module in model.modules())


def test_padding_of_vocabularies_and_the_shortest_table() -> None:
    """Rows that pad one model's embedding are no tokens; a table of positions bounds all."""
    learned = [
        small_model("vaswani2017_base", torch.float32, positions="learned", max_positions=n) for n in (80, 70)
    ]
    padded = small_model("modern_small", torch.float32, vocab_size=VOCAB + 8)
    together = Ensemble([padded, *learned])
    assert together.max_positions == 70 and Ensemble([padded]).max_positions is None
    assert together.vocab_size == VOCAB
    found = beam_search(together, pad(sources(3)), **OPTIONS)
    assert all(token < VOCAB for hypotheses in found for h in hypotheses for token in h.tokens)
