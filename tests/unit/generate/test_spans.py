"""Gaps: from text to sentinels and back."""

import pytest
import torch

from dist_transformer.config import GenerateConfig
from dist_transformer.data.token_ids import EOS_ID, PAD_ID
from dist_transformer.data.tokenizer import TextTokenizer
from dist_transformer.errors import DataError
from dist_transformer.generate import spans as spans_module
from dist_transformer.generate.search import Hypothesis
from dist_transformer.generate.spans import Filled, encode_gaps, fill_texts, parse_spans, split_at_gaps
from tests.unit.model.small import small_model


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    return TextTokenizer.train(iter(["the cat sat on the mat and the dog ran away"] * 20), 420)


def sentinel(tokenizer: TextTokenizer, gap: int) -> int:
    return tokenizer.sentinel_ids[gap]


@pytest.mark.parametrize("gap", ["<extra_id_0>", "<mask>", "___", "_______", "<extra_id_7>"])
def test_gaps_become_sentinels(tokenizer: TextTokenizer, gap: str) -> None:
    ids = encode_gaps(split_at_gaps(f"the {gap} sat on {gap}"), tokenizer)
    # As in pretraining: the space before a span is lost with it.
    assert ids == [
        *tokenizer.encode("the"),
        sentinel(tokenizer, 0),
        *tokenizer.encode(" sat on"),
        sentinel(tokenizer, 1),
    ]


def test_source_is_what_pretraining_shows(tokenizer: TextTokenizer) -> None:
    whole, lost = tokenizer.encode("the cat sat on the mat"), tokenizer.encode(" sat on")
    at = next(i for i in range(len(whole)) if whole[i : i + len(lost)] == lost)
    corrupted = [*whole[:at], sentinel(tokenizer, 0), *whole[at + len(lost) :]]
    assert encode_gaps(split_at_gaps("the cat ___ the mat"), tokenizer) == corrupted


def test_other_text_stays_text(tokenizer: TextTokenizer) -> None:
    ids = encode_gaps(split_at_gaps("a </s> <pad> __ b ___"), tokenizer)
    assert ids.count(sentinel(tokenizer, 0)) == 1
    assert not {EOS_ID, PAD_ID, *tokenizer.sentinel_ids[1:]} & set(ids)
    assert tokenizer.decode(ids) == "a </s> <pad> __ b"


def test_a_text_without_gap_is_continued(tokenizer: TextTokenizer) -> None:
    assert encode_gaps(split_at_gaps("the cat"), tokenizer) == [
        *tokenizer.encode("the cat"),
        sentinel(tokenizer, 0),
    ]


def test_too_many_gaps_name_the_line(tokenizer: TextTokenizer) -> None:
    texts = ["the ___", "___ " * 101]
    model = small_model("modern_small", vocab_size=448)
    with pytest.raises(DataError, match="line 2 has 101 gaps"):
        fill_texts(model, tokenizer, texts, GenerateConfig(), max_source_len=32, max_target_len=8)


def test_parse_spans(tokenizer: TextTokenizer) -> None:
    first, second, third = (sentinel(tokenizer, gap) for gap in range(3))
    cat, dog, noise = tokenizer.encode(" cat"), tokenizer.encode(" dog ran"), tokenizer.encode("away")
    assert parse_spans([first, *cat, second, *dog], tokenizer) == {0: " cat", 1: " dog ran"}
    assert parse_spans([*noise, third, second, *dog, EOS_ID, *cat], tokenizer) == {1: " dog ran", 2: ""}
    assert parse_spans([first, *cat, first, *dog], tokenizer) == {0: " cat"}
    assert parse_spans([], tokenizer) == {}


def fill(tokenizer: TextTokenizer, text: str, output: list[int], monkeypatch: pytest.MonkeyPatch) -> Filled:
    """What a model that says `output` makes of a text."""
    monkeypatch.setattr(
        spans_module,
        "search_sources",
        lambda model, sources, *_, **__: [[Hypothesis(output, -1.0)] for _ in sources],
    )
    model = small_model("modern_small", vocab_size=448)
    [filled] = fill_texts(model, tokenizer, [text], GenerateConfig(), max_source_len=32, max_target_len=8)
    return filled


def test_spans_are_put_in_place(tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = sentinel(tokenizer, 0), sentinel(tokenizer, 1)
    output = [first, *tokenizer.encode(" cat sat"), second, *tokenizer.encode("mat")]
    filled = fill(tokenizer, "the ___ on\tthe <mask>.", output, monkeypatch)
    assert filled.text == "the cat sat on\tthe mat."
    assert filled.marked == "the [cat sat] on\tthe [mat]."
    assert filled.spans == ("cat sat", "mat")
    assert filled.score == -1.0


def test_a_gap_left_out_stays(tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    output = [sentinel(tokenizer, 1), *tokenizer.encode(" mat")]
    filled = fill(tokenizer, "the ___ on the <mask>", output, monkeypatch)
    assert filled.text == "the ___ on the mat"
    assert filled.marked == "the ___ on the [mat]"
    assert filled.spans == (None, "mat")


def test_an_empty_span(tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    filled = fill(tokenizer, "the ___ mat", [sentinel(tokenizer, 0)], monkeypatch)
    assert (filled.text, filled.marked, filled.spans) == ("the  mat", "the [] mat", ("",))


def test_order_empty_and_long_texts(tokenizer: TextTokenizer) -> None:
    torch.manual_seed(0)
    model = small_model("modern_small", vocab_size=448)
    texts = ["the ___ on", "", "the dog " * 40 + "___", "and ___ ran <mask>"]
    filled = fill_texts(
        model, tokenizer, texts, GenerateConfig(beam_size=2), max_source_len=32, max_target_len=8
    )
    assert [len(f.spans) for f in filled] == [1, 0, 1, 2]
    assert filled[1] == Filled("", "", (), 0.0)
    assert filled[2].n_cut > 0 and filled[0].n_cut == 0


def test_a_tokenizer_without_sentinels(tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "sentinel_ids", ())
    model = small_model("modern_small", vocab_size=448)
    with pytest.raises(DataError, match="no <extra_id_N> tokens"):
        fill_texts(model, tokenizer, ["___"], GenerateConfig(), max_source_len=32, max_target_len=8)


def test_a_mode_token_begins_every_source(tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[list[int]] = []

    def search(model: object, sources: list[list[int]], *_: object, **__: object) -> list[list[Hypothesis]]:
        shown.extend(sources)
        return [[Hypothesis([sentinel(tokenizer, 0), *tokenizer.encode(" cat")], -1.0)] for _ in sources]

    monkeypatch.setattr(spans_module, "search_sources", search)
    model, mode_id = small_model("modern_small", vocab_size=448), tokenizer.mode_ids["R"]
    [filled] = fill_texts(
        model, tokenizer, ["the ___"], GenerateConfig(), max_source_len=9, max_target_len=8, mode_id=mode_id
    )
    assert shown == [[mode_id, *tokenizer.encode("the"), sentinel(tokenizer, 0)]]
    assert filled.text == "the cat"
    assert filled.n_cut == 0
    # Of a long text that is continued, the end is seen, with the gap behind it; of one with gaps, the beginning.
    shown.clear()
    long = "the dog ran on " * 9
    options: dict[str, int] = {"max_source_len": 9, "max_target_len": 8, "mode_id": mode_id}
    found = fill_texts(model, tokenizer, [long, f"the ___ {long}"], GenerateConfig(), **options)
    ids = tokenizer.encode(long)
    assert shown[0] == [mode_id, *ids[-6:], sentinel(tokenizer, 0)]
    assert shown[1][:4] == [mode_id, *tokenizer.encode("the"), sentinel(tokenizer, 0), shown[1][3]]
    assert [len(source) for source in shown] == [8, 8]
    assert found[0].n_cut == len(ids) + 2 - 8 and found[0].text == long + " cat"
