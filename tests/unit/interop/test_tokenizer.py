"""Our tokenizer in Hugging Face's hands gives our ids; theirs with other ids gives the ids that batches need."""

import json
from pathlib import Path
from typing import Literal

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

from dist_transformer.data.tokenizer import TextTokenizer
from dist_transformer.errors import DataError
from dist_transformer.interop.tokenizer import read_from_huggingface, save_for_huggingface, tokens_of
from tests.unit.interop.cases import train_tokenizer

TEXTS = [
    "a fox jumps over the dog",
    "  two  spaces, a tab\tand Überraschung 🦊 ",
    "it spells </s> and <extra_id_0> and <pad> out",
    "don't , stop . \n next line",
]
CORPUS = ["a fox jumps over the dog, and the dog over the fox; don't stop"] * 20


@pytest.mark.parametrize("model", ["bpe", "unigram"])
def test_auto_tokenizer_gives_our_ids(model: Literal["bpe", "unigram"], tmp_path: Path) -> None:
    ours = TextTokenizer.train(iter(CORPUS), 420, model) if model == "bpe" else unigram()
    save_for_huggingface(ours, tmp_path, 77, reads_sentinels=False)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        ids = theirs(text).input_ids
        assert ids == [*ours.encode(text), ours.eos_id]
        assert theirs.decode(ids, skip_special_tokens=True) == ours.decode(ids) == text
    padded = theirs(TEXTS, padding=True)
    assert all(
        row[sum(mask) :] == [ours.pad_id] * (len(row) - sum(mask))
        for row, mask in zip(padded.input_ids, padded.attention_mask, strict=True)
    )
    assert (theirs.pad_token_id, theirs.eos_token_id, theirs.unk_token_id) == (0, 1, 2)
    assert theirs.model_max_length == 77
    assert len(theirs) == ours.vocab_size


def unigram() -> TextTokenizer:
    return TextTokenizer.train(iter(f"{text} {i}" for i, text in enumerate(CORPUS * 3)), 500, "unigram")


def test_a_model_of_gaps_reads_sentinels(tmp_path: Path) -> None:
    ours = train_tokenizer()
    save_for_huggingface(ours, tmp_path, 77, reads_sentinels=True)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    ids = theirs("a <extra_id_0> over").input_ids
    assert ours.sentinel_ids[0] in ids
    assert theirs("a fox").input_ids == [*ours.encode("a fox"), ours.eos_id]


def test_there_and_back(tmp_path: Path) -> None:
    ours = train_tokenizer()
    save_for_huggingface(ours, tmp_path, 77, reads_sentinels=False)
    back = read_from_huggingface(tmp_path, range(ours.vocab_size))
    assert tokens_of(back) == tokens_of(ours)
    assert back.encode_batch(TEXTS) == ours.encode_batch(TEXTS)


def foreign(kind: str, folder: Path, *, specials_last: bool) -> Tokenizer:
    """A tokenizer as BART's (special tokens first) or with special tokens behind the vocabulary."""
    specials = ["<s>", "<pad>", "</s>", "<unk>"]
    first = ["<unk>"] if specials_last else specials
    options = {
        "vocab_size": 320,
        "special_tokens": first,
        "initial_alphabet": pre_tokenizers.ByteLevel.alphabet(),
    }
    if kind == "bpe":
        tokenizer, trainer = Tokenizer(models.BPE()), trainers.BpeTrainer(**options)
    else:
        tokenizer, trainer = (
            Tokenizer(models.Unigram()),
            trainers.UnigramTrainer(**options, unk_token="<unk>"),
        )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator([f"{text} {i}" for i, text in enumerate(CORPUS)], trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in specials])
    tokenizer.save(str(folder / "tokenizer.json"))
    return tokenizer


@pytest.mark.parametrize("specials_last", [False, True])
@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_other_ids(kind: str, specials_last: bool, tmp_path: Path) -> None:
    theirs = foreign(kind, tmp_path, specials_last=specials_last)
    n = theirs.get_vocab_size()
    pad, eos = theirs.token_to_id("<pad>"), theirs.token_to_id("</s>")
    order = [pad, eos, *(i for i in range(n) if i not in (pad, eos))]
    ours = read_from_huggingface(tmp_path, order)
    assert (ours.pad_id, ours.eos_id) == (0, 1)
    theirs.encode_special_tokens = True
    for text in TEXTS:
        ids = ours.encode(text)
        assert [order[i] for i in ids] == theirs.encode(text, add_special_tokens=False).ids
        assert ours.decode(ids) == text


def test_what_does_not_belong_together(tmp_path: Path) -> None:
    theirs = foreign("bpe", tmp_path, specials_last=False)
    n = theirs.get_vocab_size()
    with pytest.raises(DataError, match="do not belong together"):
        read_from_huggingface(tmp_path, range(n - 1))
    with pytest.raises(DataError, match="padding and end of sequence"):
        read_from_huggingface(tmp_path, range(n))


def test_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no tokenizer"):
        read_from_huggingface(tmp_path, range(10))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "marian"}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "MarianTokenizer"}))
    with pytest.raises(DataError, match=r"its tokenizer cannot be had as a tokenizer\.json"):
        read_from_huggingface(tmp_path, range(10))
    (tmp_path / "tokenizer.json").write_text("[]")
    with pytest.raises(DataError, match=r"is not a tokenizer\.json"):
        read_from_huggingface(tmp_path, range(10))
