"""Whole texts: order, empty and long lines, batches, the model's mode."""

from functools import partial

import pytest
import torch

from dist_transformer.config import GenerateConfig
from dist_transformer.data.token_ids import EOS_ID
from dist_transformer.data.tokenizer import TextTokenizer
from dist_transformer.generate.search import beam_search
from dist_transformer.generate.text import (
    batches_by_length,
    continue_texts,
    describe_truncated,
    generate_texts,
)
from dist_transformer.model import EncoderDecoder
from tests.unit.model.small import small_model

TEXTS = [
    "a red house",
    "the old river and nobody knows why they left",
    "",
    "who built it",
    "  ",
    "near",
    "a red house",
]


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    texts = [
        "the old river and nobody knows why they left",
        "a small red house stands near",
        "who built it or",
    ]
    return TextTokenizer.train(iter(texts * 20), 420)


@pytest.fixture
def model(tokenizer: TextTokenizer) -> EncoderDecoder:
    return small_model("modern_small", vocab_size=448).train()


generate = partial(generate_texts, max_source_len=32, max_target_len=6)


def test_order_and_empty_lines(model: EncoderDecoder, tokenizer: TextTokenizer) -> None:
    config = GenerateConfig(beam_size=3)
    outputs = generate(model, tokenizer, TEXTS, config)
    assert len(outputs) == len(TEXTS)
    for text, output in zip(TEXTS, outputs, strict=True):
        if not text.strip():
            assert (output.text, output.score, output.alternatives, output.n_cut) == ("", 0.0, (), 0)
            continue
        [[best]] = beam_search(
            model.eval(),
            torch.tensor([[*tokenizer.encode(text), EOS_ID]]),
            beam_size=3,
            length_penalty=1.0,
            max_len=6,
            n_vocab=tokenizer.vocab_size,
        )
        assert output.text == tokenizer.decode(best.tokens)
        assert output.score == pytest.approx(best.score, rel=1e-4)
    assert len({output.text for output in outputs}) > 3


@pytest.mark.parametrize("batch_tokens", [1, 20, 100_000])
def test_batches_do_not_matter(model: EncoderDecoder, tokenizer: TextTokenizer, batch_tokens: int) -> None:
    expected = generate(model, tokenizer, TEXTS, GenerateConfig(beam_size=2))
    outputs = generate(model, tokenizer, TEXTS, GenerateConfig(beam_size=2, batch_tokens=batch_tokens))
    assert [output.text for output in outputs] == [output.text for output in expected]


@pytest.mark.parametrize("training", [True, False])
def test_mode_is_restored(model: EncoderDecoder, tokenizer: TextTokenizer, training: bool) -> None:
    model.train(training)
    generate(model, tokenizer, TEXTS, GenerateConfig(beam_size=1))
    assert model.training is training
    with pytest.raises(KeyboardInterrupt):
        generate(model, tokenizer, TEXTS, GenerateConfig(beam_size=1), on_progress=_interrupt)
    assert model.training is training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def _interrupt(n_done: int, n_all: int) -> None:
    raise KeyboardInterrupt


def test_dropout_is_off(tokenizer: TextTokenizer) -> None:
    plain, noisy = (small_model("modern_small", vocab_size=448, dropout=rate).train() for rate in (0.0, 0.5))
    config = GenerateConfig(beam_size=2)
    expected = generate(plain, tokenizer, TEXTS, config)
    assert [o.text for o in generate(noisy, tokenizer, TEXTS, config)] == [o.text for o in expected]


def test_long_lines_are_cut_and_named(model: EncoderDecoder, tokenizer: TextTokenizer) -> None:
    texts = ["near", "a red house " * 30, "", "the old river " * 20]
    config = GenerateConfig(beam_size=2)
    outputs = generate(model, tokenizer, texts, config)
    lengths = [len(tokenizer.encode(text)) for text in texts]
    assert [output.n_cut for output in outputs] == [0, lengths[1] - 31, 0, lengths[3] - 31]
    shorter = tokenizer.decode(tokenizer.encode(texts[1])[:31])
    assert outputs[1].text == generate(model, tokenizer, [shorter], config)[0].text
    sentence = describe_truncated([o.n_cut for o in outputs], 32)
    assert sentence == ("2 of 4 inputs are longer than data.max_source_len=32 tokens and were cut: line 2, 4")
    assert describe_truncated([outputs[0].n_cut], 32) is None
    assert "line 2, 4, 6, 8, 10 and 5 more" in str(describe_truncated([o.n_cut for o in outputs] * 5, 32))


def test_learned_positions_bound_both_sides(tokenizer: TextTokenizer) -> None:
    model = small_model("positions_learned", vocab_size=448)
    outputs = generate_texts(
        model,
        tokenizer,
        ["near " * 200],
        GenerateConfig(beam_size=2, max_len=100),
        max_source_len=500,
        max_target_len=500,
    )
    assert len(outputs) == 1


def test_n_best_and_progress(model: EncoderDecoder, tokenizer: TextTokenizer) -> None:
    progress: list[tuple[int, int]] = []
    outputs = generate(
        model,
        tokenizer,
        TEXTS,
        GenerateConfig(beam_size=3, batch_tokens=40),
        n_best=3,
        on_progress=lambda *n: progress.append(n),
    )
    for text, output in zip(TEXTS, outputs, strict=True):
        assert len(output.alternatives) == (3 if text.strip() else 0)
        assert not output.alternatives or output.alternatives[0] == (output.text, output.score)
    assert progress[-1] == (5, 5) and progress == sorted(progress) and len(progress) > 1


def test_nothing_to_do(model: EncoderDecoder, tokenizer: TextTokenizer) -> None:
    assert generate(model, tokenizer, [], GenerateConfig()) == []
    assert [output.text for output in generate(model, tokenizer, [""], GenerateConfig())] == [""]


def test_texts_are_continued(model: EncoderDecoder, tokenizer: TextTokenizer) -> None:
    config, lengths = GenerateConfig(beam_size=2), {"max_source_len": 32, "max_target_len": 12}
    written = generate_texts(model, tokenizer, TEXTS, config, n_best=1, **lengths)
    continued = continue_texts(model, tokenizer, TEXTS, config, **lengths)
    assert [c.text for c in continued] == [t + w.text for t, w in zip(TEXTS, written, strict=True)]
    assert [c.score for c in continued] == [w.score for w in written]
    # Of a long text the model sees the end, behind which it writes.
    long = "the old river " * 20 + "a red house"
    tail = tokenizer.decode(tokenizer.encode(long)[-31:])
    assert len(tokenizer.encode(tail)) == 31
    [seen], [of_tail] = (continue_texts(model, tokenizer, [text], config, **lengths) for text in (long, tail))
    assert seen.text.removeprefix(long) == of_tail.text.removeprefix(tail)
    assert seen.n_cut == len(tokenizer.encode(long)) - 31 and of_tail.n_cut == 0
    marked = continue_texts(model, tokenizer, TEXTS, config, mode_id=tokenizer.mode_ids["S"], **lengths)
    assert [m.score for m, t in zip(marked, TEXTS, strict=True) if t.strip()] != [
        c.score for c, t in zip(continued, TEXTS, strict=True) if t.strip()
    ]


def test_batches_by_length() -> None:
    lengths = [3, 10, 4, 50, 4, 1, 10]
    batches = batches_by_length(lengths, batch_tokens=20, most_rows=3)
    assert sorted(i for batch in batches for i in batch) == list(range(7))
    assert batches == [[3], [1, 6], [2, 4, 0], [5]]
