"""Gaps in a text, filled by a model that was pretrained with span corruption or with UL2's mixture."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from dist_transformer.config import GenerateConfig
from dist_transformer.data.token_ids import EOS_ID
from dist_transformer.data.tokenizer import TextTokenizer
from dist_transformer.errors import DataError
from dist_transformer.generate.ensemble import Scorer
from dist_transformer.generate.text import OnProgress, check_n_best, longest_sequence, search_sources

# The space before a gap belongs to the span, as in pretraining: a word's token carries the space before it.
_GAP = re.compile(r"([ \t]?)(<extra_id_\d+>|<mask>|_{3,})")


@dataclass(frozen=True)
class Filled:
    """A text with its gaps filled."""

    text: str
    """The text with the spans in place. A gap that the model left out stays as it was written."""
    marked: str
    """The same with each span in square brackets."""
    spans: tuple[str | None, ...]
    """What stands in each gap, in order, without surrounding blanks; None where the model left it out."""
    score: float
    """The output's log-probability in nats / length ** length_penalty."""
    alternatives: tuple[tuple[str, float], ...] = ()
    """The n best texts with their scores, best first, `text` included; empty for an empty text."""
    n_cut: int = 0
    """Source tokens beyond `max_source_len`, which the model did not see."""


def fill_texts(
    model: Scorer,
    tokenizer: TextTokenizer,
    texts: Sequence[str],
    config: GenerateConfig,
    *,
    max_source_len: int,
    max_target_len: int,
    n_best: int = 1,
    lines: Sequence[int] | None = None,
    mode_id: int | None = None,
    on_progress: OnProgress | None = None,
) -> list[Filled]:
    """Fill the gaps of each text, in the order of the texts.

    A gap is written `<extra_id_0>`, `<mask>` or `___` (three underscores or more), in any mixture. Gaps are
    numbered in the order of the text, as in pretraining, whatever numbers are written. A text without a gap
    is continued: it gets one at its end. An empty text stays empty. Everything else is text: `</s>` in it is
    four characters, not a token.

    Args:
        max_source_len: longest source in tokens, EOS counted; what is beyond is not seen.
        max_target_len: longest output in tokens, EOS counted, where `config.max_len` is null.
        n_best, lines, mode_id: as `generate_texts`.

    Raises:
        ConfigError: n_best is more than the search keeps.
        DataError: the tokenizer has no sentinels, or a text has more gaps than there are.
    """
    if not tokenizer.sentinel_ids:
        raise DataError("the tokenizer has no <extra_id_N> tokens: only a span-corruption model fills gaps")
    check_n_best(config, n_best)
    numbers = range(len(texts)) if lines is None else lines
    pieces = [split_at_gaps(text) for text in texts]
    mode = [] if mode_id is None else [mode_id]
    sources = [encode_gaps(p, tokenizer, i + 1) for i, p in zip(numbers, pieces, strict=True)]
    room = longest_sequence(model, max_source_len) - 1 - len(mode)
    n_cuts = [max(0, len(source) - room) for source in sources]
    # Of a text that is continued, the end is what counts: the gap is behind it.
    seen = [
        mode + (source[n_cut:] if is_continued(p) else source[: len(source) - n_cut])
        for source, n_cut, p in zip(sources, n_cuts, pieces, strict=True)
    ]
    filled = [i for i, text in enumerate(texts) if text.strip()]
    found = search_sources(
        model,
        [seen[i] for i in filled],
        config,
        n_vocab=tokenizer.vocab_size,
        max_source_len=max_source_len,
        max_target_len=max_target_len,
        n_best=n_best,
        lines=[numbers[i] for i in filled],
        on_progress=on_progress,
    )
    results = [Filled("", "", (), 0.0)] * len(texts)
    for i, hypotheses in zip(filled, found, strict=True):
        each = [_fill(pieces[i], parse_spans(h.tokens, tokenizer), h.score) for h in hypotheses]
        results[i] = replace(
            each[0],
            alternatives=tuple((one.text, one.score) for one in each),
            n_cut=n_cuts[i],
        )
    return results


def split_at_gaps(text: str) -> list[str]:
    """[text, space, gap, text, space, gap, ..., text]; the space before a gap is one blank or empty."""
    pieces = _GAP.split(text)
    return pieces if len(pieces) > 1 else [text, "", "", ""]


def is_continued(pieces: Sequence[str]) -> bool:
    """Whether `split_at_gaps` found no gap, and made one at the end."""
    return len(pieces) == 4 and not pieces[2]


def encode_gaps(pieces: Sequence[str], tokenizer: TextTokenizer, line: int = 1) -> list[int]:
    """What `split_at_gaps` gave to token ids, with a sentinel for each gap, without EOS.

    Args:
        line: named in errors.
    """
    n_gaps, n_sentinels = len(pieces) // 3, len(tokenizer.sentinel_ids)
    if n_gaps > n_sentinels:
        raise DataError(
            f"line {line} has {n_gaps} gaps, more than the {n_sentinels} sentinels: split the line"
        )
    ids: list[int] = []
    for gap, text in enumerate(pieces[::3]):
        if gap:
            ids.append(tokenizer.sentinel_ids[gap - 1])
        if text:
            ids += tokenizer.encode(text)
    return ids


def parse_spans(tokens: Sequence[int], tokenizer: TextTokenizer) -> dict[int, str]:
    """Gap number to text, from "<extra_id_0> a <extra_id_1> b" as token ids.

    Tokens before the first sentinel belong to no gap and are left out; of a repeated sentinel the first
    counts.
    """
    gap_of = {token: gap for gap, token in enumerate(tokenizer.sentinel_ids)}
    spans: dict[int, list[int]] = {}
    current: list[int] = []
    for token in tokens:
        if token == EOS_ID:
            break
        if token in gap_of:
            current = []
            spans.setdefault(gap_of[token], current)
        else:
            current.append(token)
    return {gap: tokenizer.decode(span) for gap, span in spans.items()}


def _fill(pieces: Sequence[str], spans: dict[int, str], score: float) -> Filled:
    text, marked = [pieces[0]], [pieces[0]]
    found: list[str | None] = []
    gaps = zip(pieces[1::3], pieces[2::3], pieces[3::3], strict=True)
    for gap, (space, written, after) in enumerate(gaps):
        span = spans.get(gap)
        if span is None:
            text += [space, written, after]
            marked += [space, written, after]
            found.append(None)
            continue
        inner = span.strip()
        # The blank that was written stays, even where the model's span begins without one.
        before = span[: len(span) - len(span.lstrip())] or space
        behind = span[len(span.rstrip()) :] if inner else ""
        text += [before, inner, behind, after]
        marked += [before, f"[{inner}]", behind, after]
        found.append(inner)
    return Filled("".join(text), "".join(marked), tuple(found), score)
