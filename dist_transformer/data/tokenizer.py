"""The tokenizer: Hugging Face `tokenizers` with this project's special tokens and a lossless round trip."""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from dist_transformer.errors import DataError

PAD_TOKEN, EOS_TOKEN, UNK_TOKEN = "<pad>", "</s>", "<unk>"
MODES = ("R", "S", "X")
"""UL2's modes; the token of R is `[R]`."""
N_SENTINELS = 100
_MODE_TOKENS = tuple(f"[{mode}]" for mode in MODES)
_SPECIAL_TOKENS = (PAD_TOKEN, EOS_TOKEN, UNK_TOKEN, *_MODE_TOKENS)
SMALLEST_VOCABULARY = len(_SPECIAL_TOKENS) + 256 + N_SENTINELS
"""Special tokens, one token for each byte, and the sentinels."""

_PAD_NAMES, _EOS_NAMES, _UNK_NAMES = (PAD_TOKEN, "[PAD]"), (EOS_TOKEN, "[EOS]", "<eos>"), (UNK_TOKEN, "[UNK]")
_SENTINEL = re.compile(r"<extra_id_(\d+)>")

Model = Literal["bpe", "unigram"]


def check_vocab_size(vocab_size: int) -> None:
    """Raise a `DataError` for a vocabulary that does not even hold the bytes."""
    if vocab_size < SMALLEST_VOCABULARY:
        raise DataError(
            f"vocab_size={vocab_size} is too small: 256 bytes, {len(_SPECIAL_TOKENS)} special tokens and "
            f"{N_SENTINELS} sentinels need at least {SMALLEST_VOCABULARY}"
        )


class TextTokenizer:
    """Text to token ids and back.

    A trained one is byte-level, so any text comes back exactly, newlines included, and nothing is unknown.
    Its ids are <pad>=0, </s>=1, <unk>=2, the mode tokens [R]=3, [S]=4 and [X]=5, then bytes and merges, and the
    sentinels `<extra_id_0>` .. `<extra_id_99>` last.
    """

    def __init__(self, content: str, name: str = "tokenizer.json") -> None:
        """Read a `tokenizer.json`.

        Args:
            content: The file's text.
            name: What errors call it.
        """
        self.content = content
        """The file's text."""
        self.sha256 = hashlib.sha256(content.encode()).hexdigest()
        """Of the file's content."""
        self._tokenizer = _build(content, name)
        # Text that happens to contain "</s>" or "<extra_id_0>" is text: only the data pipeline places special
        # tokens.
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        vocabulary: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values()) + 1
        """One more than the largest id, special tokens and sentinels counted."""
        self.pad_id = _find(vocabulary, _PAD_NAMES, "padding", name)
        self.eos_id = _find(vocabulary, _EOS_NAMES, "end-of-sequence", name)
        self.unk_id = next((vocabulary[token] for token in _UNK_NAMES if token in vocabulary), None)
        """None where nothing can be unknown."""
        numbered = {int(m[1]): i for token, i in vocabulary.items() if (m := _SENTINEL.fullmatch(token))}
        self.sentinel_ids: tuple[int, ...] = tuple(numbered[k] for k in sorted(numbered))
        """Ids of `<extra_id_0>`, `<extra_id_1>`, ...; empty where the tokenizer has none."""
        added = {token.content: i for i, token in self._tokenizer.get_added_tokens_decoder().items()}
        # An ordinary token of this name could also come from text.
        self.mode_ids: dict[str, int] = {
            mode: added[token] for mode, token in zip(MODES, _MODE_TOKENS, strict=True) if token in added
        }
        """Ids of UL2's mode tokens by mode; those that the tokenizer has."""
        self._unshown = {self.pad_id, self.eos_id}

    @classmethod
    def train(cls, texts: Iterator[str], vocab_size: int, model: Model = "bpe") -> Self:
        """Train on texts.

        Args:
            texts: Training texts, read once.
            vocab_size: Ids wanted, special tokens and sentinels counted. Little text may give fewer: the
                tokenizer's own `vocab_size` says how many there are.
            model: bpe (Sennrich et al. 2016) or unigram (Kudo 2018), both over bytes.

        Raises:
            DataError: `vocab_size` does not even hold the bytes, or there is no text.
        """
        check_vocab_size(vocab_size)
        options: dict[str, Any] = {
            "vocab_size": vocab_size - N_SENTINELS,
            "special_tokens": list(_SPECIAL_TOKENS),
            "initial_alphabet": sorted(pre_tokenizers.ByteLevel.alphabet()),
            "show_progress": False,
        }
        trainer: Any
        if model == "bpe":
            tokenizer, trainer = Tokenizer(models.BPE()), trainers.BpeTrainer(**options)
        else:
            tokenizer, trainer = (
                Tokenizer(models.Unigram()),
                trainers.UnigramTrainer(unk_token=UNK_TOKEN, **options),
            )
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        tokenizer.decoder = decoders.ByteLevel()
        # An empty text as the first would be skipped silently; no text at all makes the unigram trainer
        # panic.
        first = next(texts, None)
        if first is None:
            raise DataError("there is no text to train a tokenizer on")
        tokenizer.train_from_iterator(_chain(first, texts), trainer=trainer)
        tokenizer.add_special_tokens(
            [AddedToken(f"<extra_id_{i}>", special=True, normalized=False) for i in range(N_SENTINELS)]
        )
        trained = cls(tokenizer.to_str(pretty=False))
        if trained.vocab_size > vocab_size:  # the unigram trainer stops pruning early on little text
            raise DataError(
                f"vocab_size={vocab_size} is too small for this text: the {model} trainer stops at "
                f"{trained.vocab_size}; ask for at least that, or use the model bpe"
            )
        return trained

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a `tokenizer.json`, ours or any of Hugging Face's; special tokens are found by their content.

        Raises:
            DataError: no such file, not a tokenizer, or one without a padding or end-of-sequence token.
        """
        try:
            content = Path(path).read_bytes().decode("utf-8")
        except OSError as error:
            raise DataError(
                f"tokenizer {path} cannot be read ({error.strerror}): give a tokenizer.json"
            ) from error
        except UnicodeDecodeError as error:
            raise DataError(f"{path} is not a tokenizer.json: it is not UTF-8 text") from error
        return cls(content, str(path))

    def save(self, path: str | Path) -> None:
        """Write the `tokenizer.json`, byte for byte what was loaded or trained."""
        Path(path).write_bytes(self.content.encode("utf-8"))

    def parents(self) -> NDArray[np.int32]:
        """[vocab_size, 2] the two tokens that BPE merged each token from, -1 where it was not.

        Raises:
            DataError: the tokenizer is no BPE, or has no merges.
        """
        model = json.loads(self.content)["model"]
        if not model.get("merges"):
            raise DataError(
                f"data.subword_dropout undoes the merges of BPE, and this tokenizer ({model.get('type', 'unknown')}) "
                "has none: leave it (and data.subword_dropout_target) at 0, or prepare with --model bpe"
            )
        vocabulary, prefix = model["vocab"], model.get("continuing_subword_prefix") or ""
        parents = np.full((self.vocab_size, 2), -1, np.int32)
        for merge in model["merges"]:
            left, right = merge.split(" ") if isinstance(merge, str) else merge
            merged = vocabulary[left + right.removeprefix(prefix)]
            if parents[merged, 0] < 0:  # a token that two merges make is made by the earlier one
                parents[merged] = vocabulary[left], vocabulary[right]
        return parents

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without EOS. Special tokens written in the text are encoded as plain text."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of many texts, on several threads where TOKENIZERS_PARALLELISM allows."""
        return [e.ids for e in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Iterable[int], *, keep_sentinels: bool = False) -> str:
        """Text of ids. Padding and EOS leave no trace; sentinels (`<extra_id_0>`) and mode tokens (`[R]`) stay on
        request.
        """
        shown = [i for i in map(int, ids) if i not in self._unshown]
        text: str = self._tokenizer.decode(shown, skip_special_tokens=not keep_sentinels)
        return text


def _chain(first: str, rest: Iterator[str]) -> Iterator[str]:
    yield first
    yield from rest


def _build(content: str, name: str) -> Tokenizer:
    """The tokenizer, with its special tokens marked as special even where the file does not say so."""
    try:
        described = json.loads(content)
        names = {*_PAD_NAMES, *_EOS_NAMES, *_UNK_NAMES, *_MODE_TOKENS}
        for token in described.get("added_tokens") or []:
            if token["content"] in names or _SENTINEL.fullmatch(token["content"]):
                token["special"] = True
        return Tokenizer.from_str(json.dumps(described))
    except Exception as error:  # `tokenizers` raises bare Exception for anything it cannot read
        raise DataError(f"{name} is not a tokenizer.json of Hugging Face tokenizers ({error})") from error


def _find(vocabulary: dict[str, int], names: tuple[str, ...], role: str, name: str) -> int:
    for token in names:
        if token in vocabulary:
            return vocabulary[token]
    raise DataError(
        f"{name} has no {role} token ({' or '.join(names)}): add one, or train a tokenizer with `prepare`"
    )
