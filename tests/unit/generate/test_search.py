"""Beam search against exhaustive search, recomputation and Hugging Face."""

import itertools
import math
from collections.abc import Sequence
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from transformers import MarianConfig, MarianMTModel, T5Config, T5ForConditionalGeneration

from dist_transformer.data.token_ids import EOS_ID, PAD_ID
from dist_transformer.generate.search import Hypothesis, _top_k, beam_search
from dist_transformer.interop.families import choose_family
from dist_transformer.interop.huggingface import to_huggingface
from dist_transformer.model import EncoderDecoder
from tests.unit.generate.trained import trained_model
from tests.unit.model.small import PRESETS, VOCAB, small_config, small_model

Stop = Literal["estimate", "exact", "first"]


def sources(n: int, n_vocab: int = VOCAB, longest: int = 9, seed: int = 0) -> list[list[int]]:
    """Random sources of 1 to `longest` tokens and EOS."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (n,), generator=generator).tolist()
    return [[*torch.randint(2, n_vocab, (k,), generator=generator).tolist(), EOS_ID] for k in lengths]


def pad(rows: Sequence[list[int]], length: int = 0) -> Tensor:
    length = max([length, *map(len, rows)])
    return torch.tensor([row + [PAD_ID] * (length - len(row)) for row in rows])


@torch.no_grad()
def log_p_of_next(model: EncoderDecoder, source: list[int], tokens: list[int]) -> Tensor:
    """log p [T + 1, V] of what follows each prefix of an output, computed without a cache."""
    source_1S, fed_1T = torch.tensor([source]), torch.tensor([[PAD_ID, *tokens]])
    positions = torch.arange(64)
    hidden = model(
        source_1S,
        torch.ones_like(source_1S),
        positions[None, : len(source)],
        fed_1T,
        torch.ones_like(fed_1T),
        positions[None, : fed_1T.shape[1]],
    )
    return model.logits(hidden)[0].log_softmax(-1)


def log_p(model: EncoderDecoder, source: list[int], tokens: list[int]) -> float:
    """The log-probability of an output, EOS included where it is given."""
    steps = log_p_of_next(model, source, tokens[:-1])
    return float(sum(steps[i, token] for i, token in enumerate(tokens)))


def all_outputs(
    model: EncoderDecoder, source: list[int], ids: list[int], max_len: int, penalty: float
) -> list[Hypothesis]:
    """Every output there is, best first."""
    found: list[Hypothesis] = []
    for length in range(1, max_len + 1):
        bodies = [list(body) for body in itertools.product(ids, repeat=length - 1)]
        found += [Hypothesis(b, log_p(model, source, [*b, EOS_ID]) / length**penalty) for b in bodies]
    cuts = [list(cut) for cut in itertools.product(ids, repeat=max_len)]
    found += [Hypothesis(cut, log_p(model, source, cut) / max_len**penalty) for cut in cuts]
    return sorted(found, key=lambda h: -h.score)


@pytest.mark.parametrize("length_penalty", [-1.5, 0.0, 1.0, 2.5])
def test_a_wide_beam_is_exhaustive(length_penalty: float) -> None:
    # Ids 5 and 6 are rows that pad the embedding; 0 is padding; 2, 3, 4 and EOS remain.
    model = small_model("modern_small", torch.float64, vocab_size=7)
    rows = sources(2, n_vocab=5, longest=4)
    expected = [all_outputs(model, row, [2, 3, 4], 4, length_penalty) for row in rows]
    n_all = len(expected[0])
    assert n_all == 1 + 3 + 9 + 27 + 81
    options: dict[str, Any] = {"length_penalty": length_penalty, "max_len": 4, "n_vocab": 5}
    for found, outputs in zip(
        beam_search(model, pad(rows), beam_size=n_all, n_best=n_all, stop="exact", **options),
        expected,
        strict=True,
    ):
        assert [h.tokens for h in found] == [h.tokens for h in outputs]
        assert [h.score for h in found] == pytest.approx([h.score for h in outputs], rel=1e-5)
    best_only = beam_search(model, pad(rows), beam_size=n_all, stop="exact", **options)
    assert [h[0].tokens for h in best_only] == [outputs[0].tokens for outputs in expected]


@pytest.mark.parametrize("kind", PRESETS)
@pytest.mark.parametrize("beam_size", [1, 4])
def test_scores_are_the_models_log_probabilities(kind: str, beam_size: int) -> None:
    model, rows = trained_model(kind), sources(6)
    outputs = beam_search(
        model, pad(rows), beam_size=beam_size, length_penalty=0.6, max_len=8, n_vocab=VOCAB, n_best=beam_size
    )
    for row, hypotheses in zip(rows, outputs, strict=True):
        assert len({tuple(h.tokens) for h in hypotheses}) == beam_size
        assert [h.score for h in hypotheses] == sorted((h.score for h in hypotheses), reverse=True)
        for tokens, score in hypotheses:
            ended = tokens if len(tokens) == 8 else [*tokens, EOS_ID]
            assert score == pytest.approx(log_p(model, row, ended) / len(ended) ** 0.6, rel=1e-4)


@pytest.mark.parametrize("kind", PRESETS)
def test_greedy_equals_argmax_without_a_cache(kind: str) -> None:
    model, rows = trained_model(kind), sources(20)
    outputs = beam_search(model, pad(rows), beam_size=1, length_penalty=1.0, max_len=12, n_vocab=VOCAB)
    lengths = set()
    for row, [hypothesis] in zip(rows, outputs, strict=True):
        tokens: list[int] = []
        while len(tokens) < 12 and tokens[-1:] != [EOS_ID]:
            steps = log_p_of_next(model, row, tokens)[-1]
            steps[PAD_ID] = -math.inf
            tokens.append(int(steps.argmax()))
        assert hypothesis.tokens == [token for token in tokens if token != EOS_ID]
        lengths.add(len(hypothesis.tokens))
    assert len(lengths) > 3  # or rows that end at different steps were not tried


@pytest.mark.parametrize("kind", PRESETS)
@pytest.mark.parametrize("beam_size", [1, 5])
def test_batch_and_padding_do_not_matter(kind: str, beam_size: int) -> None:
    model, rows = trained_model(kind).double(), sources(12)
    options: dict[str, Any] = {"length_penalty": 1.0, "max_len": 10, "n_vocab": VOCAB, "n_best": beam_size}
    together = beam_search(model, pad(rows), beam_size=beam_size, **options)
    wide = beam_search(model, pad(rows, length=23), beam_size=beam_size, **options)
    for i, row in enumerate(rows):
        [alone] = beam_search(model, pad([row]), beam_size=beam_size, **options)
        for other in (together[i], wide[i]):
            assert [h.tokens for h in other] == [h.tokens for h in alone]
            assert [h.score for h in other] == pytest.approx([h.score for h in alone], rel=1e-5)


def test_length_penalty_moves_the_length() -> None:
    model, rows = trained_model("modern_small"), sources(20)
    mean_lengths = []
    for penalty in (-1.0, 0.0, 1.0, 3.0):
        outputs = beam_search(
            model, pad(rows), beam_size=6, length_penalty=penalty, max_len=16, n_vocab=VOCAB, stop="exact"
        )
        mean_lengths.append(sum(len(h[0].tokens) for h in outputs) / len(rows))
    assert mean_lengths == sorted(mean_lengths)
    assert mean_lengths[-1] > mean_lengths[0] + 2


@pytest.mark.parametrize("length_penalty", [-0.8, 0.0, 1.0, 2.0])
def test_exact_stop_loses_nothing(length_penalty: float) -> None:
    """Stopping for the best one output gives what searching for all of them gives."""
    model, rows = trained_model("modern_small"), sources(20)
    options: dict[str, Any] = {
        "length_penalty": length_penalty,
        "max_len": 14,
        "n_vocab": VOCAB,
        "stop": "exact",
    }
    one = beam_search(model, pad(rows), beam_size=4, **options)
    four = beam_search(model, pad(rows), beam_size=4, n_best=4, **options)
    assert [h[0].tokens for h in one] == [h[0].tokens for h in four]
    if length_penalty <= 0:  # where the estimate is exact too
        estimate = beam_search(model, pad(rows), beam_size=4, **{**options, "stop": "estimate"})
        assert [h[0].tokens for h in estimate] == [h[0].tokens for h in four]


@pytest.mark.parametrize("beam_size", [1, 5])
def test_forbidden_ids_are_never_emitted(beam_size: int) -> None:
    model, rows = trained_model("vaswani2017_base"), sources(10)
    outputs = beam_search(
        model, pad(rows), beam_size=beam_size, length_penalty=1.0, max_len=9, n_vocab=30, forbidden=(2, 7)
    )
    emitted = {token for [h, *_] in outputs for token in h.tokens}
    assert emitted and emitted.isdisjoint({PAD_ID, EOS_ID, 2, 7, *range(30, VOCAB)})


@pytest.mark.parametrize("beam_size", [1, 5])
def test_max_len_counts_eos(beam_size: int) -> None:
    model, rows = trained_model("vaswani2017_base"), sources(4, longest=9)
    for max_len in (1, 3):
        outputs = beam_search(
            model, pad(rows), beam_size=beam_size, length_penalty=1.0, max_len=max_len, n_vocab=VOCAB
        )
        assert all(len(h[0].tokens) <= max_len for h in outputs)
        assert any(len(h[0].tokens) == max_len for h in outputs)


def test_a_diverged_model_ends() -> None:
    model, rows = trained_model("vaswani2017_base"), sources(3)
    with torch.no_grad():
        model.decoder.layers[0].feed_forward.up.weight.fill_(math.nan)  # type: ignore[union-attr, operator]
    outputs = beam_search(model, pad(rows), beam_size=3, length_penalty=1.0, max_len=6, n_vocab=VOCAB)
    assert len(outputs) == 3 and all(len(hypotheses) == 1 for hypotheses in outputs)


def test_wrong_arguments() -> None:
    model, source = small_model("vaswani2017_base"), pad(sources(1))
    with pytest.raises(ValueError, match="n_best=3"):
        beam_search(model, source, beam_size=2, length_penalty=1.0, max_len=4, n_vocab=VOCAB, n_best=3)
    with pytest.raises(ValueError, match="n_vocab=51"):
        beam_search(model, source, beam_size=2, length_penalty=1.0, max_len=4, n_vocab=VOCAB + 1)


@pytest.mark.parametrize(("n_columns", "k"), [(5000, 10), (4999, 3), (64, 4), (1280, 10), (1300, 10)])
def test_top_k_equals_torch(n_columns: int, k: int) -> None:
    x = torch.randn(7, n_columns, generator=torch.Generator().manual_seed(0))
    x[0, 10:] = -math.inf
    values, places = _top_k(x, k)
    assert torch.equal(values, x.topk(k).values)
    finite = values > -math.inf
    assert torch.equal(x.gather(1, places.clamp(max=n_columns - 1))[finite], values[finite])


def huggingface_twin(kind: str) -> tuple[torch.nn.Module, EncoderDecoder]:
    """Hugging Face's model and ours with the same random weights."""
    config = small_config(kind)
    if kind.startswith("t5"):
        theirs: torch.nn.Module = T5ForConditionalGeneration(
            T5Config(
                vocab_size=VOCAB,
                d_model=config.d_model,
                d_kv=config.head_dim,
                d_ff=config.d_ff,
                num_layers=config.n_encoder_layers,
                num_heads=config.n_heads,
                feed_forward_proj="gated-gelu",
                tie_word_embeddings=False,
                decoder_start_token_id=0,
            )
        )
        # transformers 5 ties the output, whatever its configuration says
        theirs.lm_head.weight = torch.nn.Parameter(torch.empty_like(theirs.lm_head.weight))
    else:
        theirs = MarianMTModel(
            MarianConfig(
                vocab_size=VOCAB,
                d_model=config.d_model,
                encoder_layers=config.n_encoder_layers,
                decoder_layers=config.n_decoder_layers,
                encoder_attention_heads=config.n_heads,
                decoder_attention_heads=config.n_heads,
                encoder_ffn_dim=config.d_ff,
                decoder_ffn_dim=config.d_ff,
                activation_function="relu",
                scale_embedding=True,
                max_position_embeddings=config.max_positions,
                pad_token_id=PAD_ID,
                eos_token_id=EOS_ID,
                decoder_start_token_id=PAD_ID,
                forced_eos_token_id=None,
            )
        )
    model = trained_model(kind)
    weights = dict(to_huggingface(model.config, model.state_dict(), choose_family(model.config, None)))
    found = theirs.load_state_dict(weights, strict=False)
    assert not found.unexpected_keys
    return theirs.eval(), model


@pytest.mark.parametrize("kind", ["t5_v1_1_small", "vaswani2017_base"])
@pytest.mark.parametrize(
    ("stop", "early_stopping"), [("estimate", False), ("exact", "never"), ("first", True)]
)
@pytest.mark.parametrize("length_penalty", [-0.5, 0.0, 1.0, 1.7])
def test_equals_huggingface(kind: str, stop: Stop, early_stopping: bool | str, length_penalty: float) -> None:
    theirs, ours = huggingface_twin(kind)
    source = pad(sources(40))
    n_best, max_len = 3, 14
    expected = theirs.generate(  # type: ignore[operator]
        input_ids=source,
        attention_mask=(source != PAD_ID).long(),
        num_beams=5,
        num_return_sequences=n_best,
        length_penalty=length_penalty,
        early_stopping=early_stopping,
        max_new_tokens=max_len,
        suppress_tokens=[PAD_ID],
        do_sample=False,
        return_dict_in_generate=True,
        output_scores=True,
    )
    found = beam_search(
        ours,
        source,
        beam_size=5,
        length_penalty=length_penalty,
        max_len=max_len,
        n_vocab=VOCAB,
        n_best=n_best,
        stop=stop,
    )
    hypotheses = [hypothesis for row in found for hypothesis in row]
    lengths = set()
    for hypothesis, tokens in zip(hypotheses, expected.sequences[:, 1:].tolist(), strict=True):
        end = next((i for i, token in enumerate(tokens) if token in (EOS_ID, PAD_ID)), len(tokens))
        assert hypothesis.tokens == tokens[:end]
        lengths.add(end)
    assert len(lengths) > 1
    scores = torch.tensor([hypothesis.score for hypothesis in hypotheses])
    torch.testing.assert_close(scores, expected.sequences_scores, rtol=1e-4, atol=1e-5)
