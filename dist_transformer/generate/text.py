"""Whole texts in, whole texts out: encoding, batches of similar lengths, search, decoding."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from dist_transformer.config import GenerateConfig
from dist_transformer.data.token_ids import EOS_ID, PAD_ID
from dist_transformer.data.tokenizer import TextTokenizer
from dist_transformer.errors import ConfigError
from dist_transformer.generate.ensemble import Scorer
from dist_transformer.generate.rules import Rules
from dist_transformer.generate.sampling import Distribution, sample
from dist_transformer.generate.search import Hypothesis, beam_search

OnProgress = Callable[[int, int], None]
"""Called after each batch with the number of texts done, and of all."""

_MOST_LOGITS = 1 << 26
"""Scores over the vocabulary in one step (256 MiB): bounds the batch where sources are short."""
_SHOWN_LINES = 5


@dataclass(frozen=True)
class Generated:
    """The output for one input text."""

    text: str
    """The best output."""
    score: float
    """Its log-probability in nats / length ** length_penalty; 0 for an empty input."""
    alternatives: tuple[tuple[str, float], ...]
    """The n best texts with their scores, best first, `text` included; empty for an empty input."""
    n_cut: int = 0
    """Source tokens beyond `max_source_len`, which were left out."""
    n_prefix_cut: int = 0
    """Tokens of the forced prefix that were left out: an output that long is not allowed."""


def generate_texts(
    model: Scorer,
    tokenizer: TextTokenizer,
    texts: Sequence[str],
    config: GenerateConfig,
    *,
    max_source_len: int,
    max_target_len: int,
    n_best: int = 1,
    prefixes: Sequence[str] | None = None,
    lines: Sequence[int] | None = None,
    mode_id: int | None = None,
    keep_end: bool = False,
    on_progress: OnProgress | None = None,
) -> list[Generated]:
    """An output for each text, in the order of the texts; an empty (or blank) text gives an empty output.

    Args:
        max_source_len: longest source in tokens, EOS counted; what is beyond is left out: see
            `Generated.n_cut` and `describe_truncated`.
        max_target_len: longest output in tokens, EOS counted, where `config.max_len` is null.
        n_best: outputs wanted for each text: of a search at most `config.beam_size`; samples are any number, in the
            order in which they were drawn.
        prefixes: what each output begins with; it is part of the output, of its score and of its length. What
            leaves no room for a further token is left out: see `Generated.n_prefix_cut`.
        lines: a number for each text, on which its samples depend (default: its place in `texts`).
        mode_id: a token that begins every source, as in UL2's pretraining.
        keep_end: Of a longer source, leave out its beginning.

    Raises:
        ConfigError: n_best is more than the search keeps.
    """
    check_n_best(config, n_best)
    filled = [i for i, text in enumerate(texts) if text.strip()]
    mode = [] if mode_id is None else [mode_id]
    room = longest_sequence(model, max_source_len) - 1
    whole = tokenizer.encode_batch([texts[i] for i in filled])
    n_cuts = [max(0, len(mode) + len(ids) - room) for ids in whole]
    encoded = [
        mode + (ids[n_cut:] if keep_end else ids[: len(ids) - n_cut])
        for ids, n_cut in zip(whole, n_cuts, strict=True)
    ]
    limits = output_limits(model, [len(ids) for ids in encoded], config, max_source_len, max_target_len)
    wanted = [[]] * len(filled) if prefixes is None else tokenizer.encode_batch([prefixes[i] for i in filled])
    found = search_sources(
        model,
        encoded,
        config,
        n_vocab=tokenizer.vocab_size,
        max_source_len=max_source_len,
        max_target_len=max_target_len,
        n_best=n_best,
        prefixes=wanted,
        lines=None if lines is None else [lines[i] for i in filled],
        on_progress=on_progress,
    )
    results = [Generated("", 0.0, ())] * len(texts)
    for i, n_cut, prefix, limit, hypotheses in zip(filled, n_cuts, wanted, limits, found, strict=True):
        alternatives = tuple((tokenizer.decode(h.tokens), h.score) for h in hypotheses)
        n_prefix_cut = max(0, len(prefix) + 1 - limit)
        results[i] = Generated(*alternatives[0], alternatives, n_cut, n_prefix_cut)
    return results


def continue_texts(
    model: Scorer,
    tokenizer: TextTokenizer,
    texts: Sequence[str],
    config: GenerateConfig,
    *,
    max_source_len: int,
    max_target_len: int,
    n_best: int = 1,
    prefixes: Sequence[str] | None = None,
    lines: Sequence[int] | None = None,
    mode_id: int | None = None,
    on_progress: OnProgress | None = None,
) -> list[Generated]:
    """Each text with what a model that was pretrained with prefix language modelling writes after it.

    Args: see `generate_texts`.
    """
    found = generate_texts(
        model,
        tokenizer,
        texts,
        config,
        max_source_len=max_source_len,
        max_target_len=max_target_len,
        n_best=n_best,
        prefixes=prefixes,
        lines=lines,
        mode_id=mode_id,
        keep_end=True,  # what is written stands behind the text
        on_progress=on_progress,
    )
    return [
        replace(
            generated,
            text=text + generated.text,
            alternatives=tuple((text + written, score) for written, score in generated.alternatives),
        )
        for text, generated in zip(texts, found, strict=True)
    ]


def longest_sequence(model: Scorer, limit: int) -> int:
    """The most tokens of a source or target up to a limit that the model takes, EOS counted."""
    return limit if model.max_positions is None else min(limit, model.max_positions)


def check_n_best(config: GenerateConfig, n_best: int) -> None:
    """Raise a `ConfigError` if more outputs are wanted than the search keeps."""
    if n_best > config.beam_size and not config.sample:
        raise ConfigError(
            f"{n_best} best outputs need a beam of as many: beam_size is {config.beam_size}; or sample them"
        )


def describe_truncated(n_cut: Sequence[int], max_source_len: int, first_line: int = 1) -> str | None:
    """One sentence that names the lines whose sources were cut, or None."""
    limit = f"data.max_source_len={max_source_len} tokens"
    return _describe_cut("inputs", n_cut, limit, first_line)


def describe_cut_prefixes(n_cut: Sequence[int], first_line: int = 1) -> str | None:
    """One sentence that names the lines whose forced prefixes were cut, or None."""
    return _describe_cut("prefixes", n_cut, "the longest output (max_len, max_ratio)", first_line)


def _describe_cut(what: str, n_cut: Sequence[int], limit: str, first_line: int) -> str | None:
    lines = [line for line, n in enumerate(n_cut, start=first_line) if n]
    if not lines:
        return None
    more = f" and {len(lines) - _SHOWN_LINES} more" if len(lines) > _SHOWN_LINES else ""
    return (
        f"{len(lines)} of {len(n_cut)} {what} are longer than {limit} "
        f"and were cut: line {', '.join(map(str, lines[:_SHOWN_LINES]))}{more}"
    )


def output_limits(
    model: Scorer,
    n_source_tokens: Sequence[int],
    config: GenerateConfig,
    max_source_len: int,
    max_target_len: int,
) -> list[int]:
    """The most tokens that each source's output may have, EOS counted.

    Args:
        n_source_tokens: of each source, EOS not counted; what is beyond `max_source_len` does not count.
    """
    longest = longest_sequence(model, config.max_len or max_target_len)
    if config.max_ratio is None:
        return [longest] * len(n_source_tokens)
    seen = (min(n, max_source_len - 1) for n in n_source_tokens)
    return [max(1, min(longest, math.ceil(n * config.max_ratio + config.max_extra))) for n in seen]


def search_sources(
    model: Scorer,
    sources: Sequence[Sequence[int]],
    config: GenerateConfig,
    *,
    n_vocab: int,
    max_source_len: int,
    max_target_len: int,
    n_best: int = 1,
    prefixes: Sequence[Sequence[int]] | None = None,
    lines: Sequence[int] | None = None,
    on_progress: OnProgress | None = None,
) -> list[list[Hypothesis]]:
    """The n best outputs, or n samples, for each source, in the order of the sources. The model's mode is restored.

    Args:
        sources: token ids without EOS; cut to `max_source_len` with it.
        prefixes: token ids that each output begins with; cut where they leave no room for a further one.
        lines: a number for each source, on which its samples depend (default: its place).
    """
    max_source_len = longest_sequence(model, max_source_len)
    limits = output_limits(model, [len(source) for source in sources], config, max_source_len, max_target_len)
    ended = [[*source[: max_source_len - 1], EOS_ID] for source in sources]
    n_rows = n_best if config.sample else config.beam_size
    most_rows = max(1, _MOST_LOGITS // (n_rows * model.vocab_size))
    results: list[list[Hypothesis]] = [[] for _ in ended]
    n_done, was_training = 0, model.training
    model.eval()
    try:
        for batch in batches_by_length([len(source) for source in ended], config.batch_tokens, most_rows):
            found = _decode_batch(
                model,
                _pad([ended[i] for i in batch], model.device),
                config,
                n_vocab=n_vocab,
                n_best=n_best,
                limits=[limits[i] for i in batch],
                prefixes=None if prefixes is None else [prefixes[i][: limits[i] - 1] for i in batch],
                lines=batch if lines is None else [lines[i] for i in batch],
            )
            for i, hypotheses in zip(batch, found, strict=True):
                results[i] = hypotheses
            n_done += len(batch)
            if on_progress is not None:
                on_progress(n_done, len(ended))
    finally:
        model.train(was_training)
    return results


def _decode_batch(
    model: Scorer,
    source_BS: torch.Tensor,
    config: GenerateConfig,
    *,
    n_vocab: int,
    n_best: int,
    limits: Sequence[int],
    prefixes: Sequence[Sequence[int]] | None,
    lines: Sequence[int],
) -> list[list[Hypothesis]]:
    if not config.sample:
        return beam_search(
            model,
            source_BS,
            beam_size=config.beam_size,
            length_penalty=config.length_penalty,
            stop=config.stop,
            max_len=limits,
            min_len=config.min_len,
            n_vocab=n_vocab,
            n_best=n_best,
            prefixes=prefixes,
        )
    rules = Rules(
        model, len(limits), n_vocab=n_vocab, max_len=limits, min_len=config.min_len, prefixes=prefixes
    )
    return sample(
        model,
        source_BS,
        rules,
        Distribution(config.temperature, config.top_k, config.top_p),
        n_samples=n_best,
        seed=config.seed,
        lines=lines,
        length_penalty=config.length_penalty,
    )


def batches_by_length(lengths: Sequence[int], batch_tokens: int, most_rows: int) -> list[list[int]]:
    """Indices of sources in batches of similar length, longest first: what does not fit memory fails at once.

    Args:
        batch_tokens: rows x longest row stays at most this; a longer source is a batch of its own.
        most_rows: sources in one batch.
    """
    batches: list[list[int]] = []
    n_fit = 0
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if not batches or len(batches[-1]) >= n_fit:
            batches.append([])
            n_fit = max(1, min(most_rows, batch_tokens // max(1, lengths[i])))
        batches[-1].append(i)
    return batches


def _pad(sources: list[list[int]], device: torch.device) -> torch.Tensor:
    length = max(map(len, sources))
    return torch.tensor([source + [PAD_ID] * (length - len(source)) for source in sources], device=device)
