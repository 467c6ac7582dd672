"""Our tokenizer as a Hugging Face fast one, and theirs with the ids that batches need."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from dist_transformer.data.tokenizer import TextTokenizer
from dist_transformer.errors import DataError, UserError
from dist_transformer.interop.folders import load_package

_FILES = ("tokenizer.json", "tokenizer_config.json", "spiece.model", "sentencepiece.bpe.model", "vocab.json")
"""Without any of them, `AutoTokenizer` makes up an empty tokenizer of the model's kind."""


def tokens_of(tokenizer: TextTokenizer) -> list[str]:
    """The token of each id; ids that have none are `<unused_ID>`."""
    known = Tokenizer.from_str(tokenizer.content)
    tokens = [known.id_to_token(i) for i in range(tokenizer.vocab_size)]
    return [f"<unused_{i}>" if token is None else token for i, token in enumerate(tokens)]


def with_eos(tokenizer: TextTokenizer) -> str:
    """The `tokenizer.json` that ends every text with EOS, as the model's sources end; else the same ids."""
    tree = json.loads(tokenizer.content)
    eos = tokens_of(tokenizer)[tokenizer.eos_id]
    tree["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": eos, "type_id": 0}}],
        "pair": [
            {"Sequence": {"id": "A", "type_id": 0}},
            {"SpecialToken": {"id": eos, "type_id": 0}},
            {"Sequence": {"id": "B", "type_id": 0}},
            {"SpecialToken": {"id": eos, "type_id": 0}},
        ],
        "special_tokens": {eos: {"id": eos, "ids": [tokenizer.eos_id], "tokens": [eos]}},
    }
    return json.dumps(tree, ensure_ascii=False)


def save_for_huggingface(
    tokenizer: TextTokenizer, folder: Path, max_len: int, *, reads_sentinels: bool
) -> None:
    """Write what `AutoTokenizer.from_pretrained(folder)` reads: our ids, and EOS behind them.

    Args:
        max_len: tokens of the longest source that the model was trained on.
        reads_sentinels: `<extra_id_0>` in a text is the sentinel, as models of gaps need it; else, as in our own
            data pipeline, special tokens that a text spells out are text.
    """
    transformers = load_package("transformers")
    tokens = tokens_of(tokenizer)
    names = {"pad_token": tokens[tokenizer.pad_id], "eos_token": tokens[tokenizer.eos_id]}
    if tokenizer.unk_id is not None:
        names["unk_token"] = tokens[tokenizer.unk_id]
    file = folder / "tokenizer.json"
    file.write_text(with_eos(tokenizer), encoding="utf-8")
    transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(file),
        model_max_length=max_len,
        clean_up_tokenization_spaces=False,
        split_special_tokens=not reads_sentinels,
        **names,
    ).save_pretrained(folder)


def read_from_huggingface(folder: Path, order: Sequence[int]) -> TextTokenizer:
    """A Hugging Face tokenizer with other ids.

    Args:
        order: The old id of each new one.

    Raises:
        DataError: it cannot be had as a `tokenizer.json`, or has more ids than `order`.
    """
    tree = _read(folder)
    tree["post_processor"] = None  # the data pipeline ends texts
    tree["truncation"] = tree["padding"] = None
    if list(order) != sorted(order):
        _renumber(tree, order)
    tokenizer = TextTokenizer(json.dumps(tree, ensure_ascii=False), str(folder))
    check_tokenizer(tokenizer, len(order), str(folder))
    return tokenizer


def check_tokenizer(tokenizer: TextTokenizer, n_ids: int, where: str) -> None:
    """Refuse a tokenizer that is not a model's.

    Raises:
        DataError: it has more ids than the model, or other ones for padding and end of sequence.
    """
    if tokenizer.vocab_size > n_ids:
        raise DataError(
            f"{where}: its tokenizer has {tokenizer.vocab_size} ids and the model {n_ids}: they do not belong together"
        )
    if (tokenizer.pad_id, tokenizer.eos_id) != (0, 1):
        raise DataError(f"{where}: padding and end of sequence of its tokenizer are not those of the model")


def _read(folder: Path) -> dict[str, Any]:
    file = folder / "tokenizer.json"
    if not any((folder / name).exists() for name in _FILES):
        raise DataError(f"{folder} has no tokenizer")
    try:
        if file.exists():
            tree = json.loads(file.read_text(encoding="utf-8"))
        else:
            fast = load_package("transformers").AutoTokenizer.from_pretrained(folder, local_files_only=True)
            tree = json.loads(fast.backend_tokenizer.to_str())
    except UserError:
        raise
    except Exception as error:  # whatever a tokenizer's own code raises: packages, files, formats
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise DataError(f"{folder}: its tokenizer cannot be had as a tokenizer.json: {reason[0]}") from None
    if not isinstance(tree, dict) or "model" not in tree:
        raise DataError(f"{file} is not a tokenizer.json")
    return tree


def _renumber(tree: dict[str, Any], order: Sequence[int]) -> None:
    """Give every token of a `tokenizer.json` its new id.

    Added tokens are put into the model's vocabulary: elsewhere they can only have the last ids.

    Raises:
        DataError: its kind of model lists tokens without gaps, and it has some.
    """
    new = {old: i for i, old in enumerate(order)}
    model, added = tree["model"], tree.get("added_tokens") or []
    for token in added:
        if token["id"] not in new:
            raise DataError(
                f"the tokenizer's {token['content']} has an id that the model has not: {token['id']}"
            )
    is_list = isinstance(model["vocab"], list)
    vocabulary: dict[int, Any] = (
        dict(enumerate(model["vocab"])) if is_list else {i: token for token, i in model["vocab"].items()}
    )
    for token in added:
        # A piece of the lowest score is never the better one.
        vocabulary.setdefault(token["id"], [token["content"], -1e9] if is_list else token["content"])
        token["id"] = new[token["id"]]
    tree["added_tokens"] = sorted(added, key=lambda token: token["id"])
    moved = {new[old]: token for old, token in vocabulary.items() if old in new}
    if not is_list:
        model["vocab"] = {moved[i]: i for i in sorted(moved)}
        return
    if sorted(moved) != list(range(len(moved))):
        raise DataError(
            "the tokenizer's ids have gaps, which its model cannot have: give another with --tokenizer"
        )
    model["vocab"] = [moved[i] for i in range(len(moved))]
    if model.get("unk_id") is not None:
        model["unk_id"] = new[model["unk_id"]]
