"""The tokenizer: lossless, with special tokens where they belong and nowhere else."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_transformer.data.tokenizer import SMALLEST_VOCABULARY, TextTokenizer
from dist_transformer.errors import DataError
from tests.unit.data.conftest import sentences

_SHARED = {model: TextTokenizer.train(iter(sentences(300)), 420, model) for model in ("bpe", "unigram")}  # type: ignore[arg-type]


@given(st.text(max_size=40), st.sampled_from(["bpe", "unigram"]))
def test_any_text_comes_back(text: str, model: str) -> None:
    tokenizer = _SHARED[model]
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode_batch([text]) == [ids]
    assert not {tokenizer.pad_id, tokenizer.eos_id, tokenizer.unk_id, *tokenizer.mode_ids.values()} & set(ids)


@pytest.mark.parametrize("model", ["bpe", "unigram"])
def test_ids_are_where_they_should_be(model: str) -> None:
    tokenizer = _SHARED[model]
    assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.unk_id) == (0, 1, 2)
    assert tokenizer.mode_ids == {"R": 3, "S": 4, "X": 5}
    assert tokenizer.sentinel_ids == tuple(range(tokenizer.vocab_size - 100, tokenizer.vocab_size))
    assert tokenizer.vocab_size <= 420


@pytest.mark.parametrize(
    "text", ["</s>", "a <pad> b", "<extra_id_0>", "x<extra_id_99></s><unk>", "[R] [S][X]"]
)
def test_special_tokens_in_text_are_text(text: str) -> None:
    tokenizer = _SHARED["bpe"]
    ids = tokenizer.encode(text)
    assert not {0, 1, 2, 3, 4, 5, *tokenizer.sentinel_ids} & set(ids)
    assert tokenizer.decode([*ids, 1, 0, 0]) == text


def test_sentinels_are_shown_on_request() -> None:
    tokenizer = _SHARED["bpe"]
    ids = [*tokenizer.encode("the house"), tokenizer.sentinel_ids[7], *tokenizer.encode(" river"), 1, 0]
    assert tokenizer.decode(ids) == "the house river"
    assert tokenizer.decode(ids, keep_sentinels=True) == "the house<extra_id_7> river"
    assert tokenizer.decode([tokenizer.mode_ids["X"], *ids]) == "the house river"
    marked = tokenizer.decode([tokenizer.mode_ids["X"], *ids], keep_sentinels=True)
    assert marked == "[X]the house<extra_id_7> river"


def test_save_and_load(tmp_path: Path) -> None:
    tokenizer = _SHARED["bpe"]
    tokenizer.save(tmp_path / "tokenizer.json")
    loaded = TextTokenizer.load(tmp_path / "tokenizer.json")
    assert loaded.sha256 == tokenizer.sha256
    assert loaded.encode("the </s> house") == tokenizer.encode("the </s> house")


def test_vocabularies_too_small_and_too_large() -> None:
    with pytest.raises(
        DataError, match=f"vocab_size=300 is too small: .* need at least {SMALLEST_VOCABULARY}"
    ):
        TextTokenizer.train(iter(["text"]), 300)
    assert TextTokenizer.train(iter(["ab ab"]), 30_000).vocab_size < 400
    with pytest.raises(DataError, match="no text to train a tokenizer on"):
        TextTokenizer.train(iter([]), 1000)


def test_tokenizers_of_others(tmp_path: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors

    words = {"[PAD]": 0, "[EOS]": 1, "[UNK]": 2, "the": 3, "house": 4, "<extra_id_1>": 5, "<extra_id_0>": 6}
    words |= {"[R]": 7, "[S]": 8}
    theirs = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    theirs.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    theirs.add_tokens([AddedToken("<extra_id_0>"), AddedToken("<extra_id_1>"), AddedToken("[S]")])
    theirs.post_processor = processors.TemplateProcessing(single="$A [EOS]", special_tokens=[("[EOS]", 1)])
    theirs.enable_truncation(2)
    theirs.enable_padding(length=8)
    theirs.save(str(tmp_path / "theirs.json"))
    tokenizer = TextTokenizer.load(tmp_path / "theirs.json")
    assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.unk_id) == (0, 1, 2)
    assert tokenizer.sentinel_ids == (6, 5)
    assert tokenizer.mode_ids == {"S": 8}, "[R] is an ordinary word there, which text may hold"
    assert tokenizer.encode("the house the river") == [3, 4, 3, 2]


def test_files_that_are_no_tokenizers(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    with pytest.raises(DataError, match="cannot be read"):
        TextTokenizer.load(path)
    for content in ("", "{}", "[1]", '{"added_tokens": [1]}'):
        path.write_text(content)
        with pytest.raises(DataError, match=r"t.json is not a tokenizer.json"):
            TextTokenizer.load(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="not UTF-8"):
        TextTokenizer.load(path)
    described = json.loads(_SHARED["bpe"].content)
    for token, role in (("<pad>", "padding"), ("</s>", "end-of-sequence")):
        changed = json.dumps(described).replace(f'"{token}"', '"<other>"')
        path.write_text(changed)
        with pytest.raises(DataError, match=f"has no {role} token"):
            TextTokenizer.load(path)
