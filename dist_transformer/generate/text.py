"""Whole texts in, whole texts out: encoding, batches of similar lengths, search, decoding."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from dist_transformer.config import GenerateConfig
from dist_transformer.data.batch import EOS_ID, PAD_ID
from dist_transformer.data.tokenizer import TextTokenizer
from dist_transformer.generate.search import Hypothesis, beam_search
from dist_transformer.model import EncoderDecoder

OnProgress = Callable[[int, int], None]
"""Called after each batch with the number of texts done, and of all."""

_MOST_LOGITS = 1 << 26
"""Scores over the vocabulary in one step (256 MiB): bounds the batch where sources are short."""


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


def generate_texts(
    model: EncoderDecoder,
    tokenizer: TextTokenizer,
    texts: Sequence[str],
    config: GenerateConfig,
    *,
    max_source_len: int,
    max_target_len: int,
    n_best: int = 1,
    mode_id: int | None = None,
    on_progress: OnProgress | None = None,
) -> list[Generated]:
    """An output for each text, in the order of the texts; an empty (or blank) text gives an empty output.

    Args:
        max_source_len: longest source in tokens, EOS counted; what is beyond is left out: see
            `Generated.n_cut` and `describe_truncated`.
        max_target_len: longest output in tokens, EOS counted, where `config.max_len` is null.
        n_best: outputs wanted for each text, at most `config.beam_size`.
        mode_id: a token that begins every source, as in UL2's pretraining.
    """
    filled = [i for i, text in enumerate(texts) if text.strip()]
    mode = [] if mode_id is None else [mode_id]
    encoded = [mode + ids for ids in tokenizer.encode_batch([texts[i] for i in filled])]
    found = search_sources(
        model,
        encoded,
        config,
        n_vocab=tokenizer.vocab_size,
        max_source_len=max_source_len,
        max_target_len=max_target_len,
        n_best=n_best,
        on_progress=on_progress,
    )
    results = [Generated("", 0.0, ())] * len(texts)
    for i, tokens, hypotheses in zip(filled, encoded, found, strict=True):
        alternatives = tuple((tokenizer.decode(h.tokens), h.score) for h in hypotheses)
        results[i] = Generated(*alternatives[0], alternatives, max(0, len(tokens) + 1 - max_source_len))
    return results


def continue_texts(
    model: EncoderDecoder,
    tokenizer: TextTokenizer,
    texts: Sequence[str],
    config: GenerateConfig,
    *,
    max_source_len: int,
    max_target_len: int,
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
        mode_id=mode_id,
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


def describe_truncated(n_cut: Sequence[int], max_source_len: int, shown: int = 5) -> str | None:
    """One sentence that names the lines (from 1) whose sources were cut, or None."""
    lines = [line for line, n in enumerate(n_cut, start=1) if n]
    if not lines:
        return None
    more = f" and {len(lines) - shown} more" if len(lines) > shown else ""
    return (
        f"{len(lines)} of {len(n_cut)} inputs are longer than data.max_source_len={max_source_len} tokens "
        f"and were cut: line {', '.join(map(str, lines[:shown]))}{more}"
    )


def search_sources(
    model: EncoderDecoder,
    sources: Sequence[Sequence[int]],
    config: GenerateConfig,
    *,
    n_vocab: int,
    max_source_len: int,
    max_target_len: int,
    n_best: int = 1,
    on_progress: OnProgress | None = None,
) -> list[list[Hypothesis]]:
    """The n best outputs for each source, in the order of the sources. The model's mode is restored.

    Args:
        sources: token ids without EOS; cut to `max_source_len` with it.
    """
    longest = config.max_len or max_target_len
    if model.config.positions == "learned":
        # The table has no row for a position beyond.
        max_source_len = min(max_source_len, model.config.max_positions)
        longest = min(longest, model.config.max_positions)
    ended = [[*source[: max_source_len - 1], EOS_ID] for source in sources]
    most_rows = max(1, _MOST_LOGITS // (config.beam_size * model.vocab_size))
    results: list[list[Hypothesis]] = [[] for _ in ended]
    n_done, was_training = 0, model.training
    model.eval()
    try:
        for batch in batches_by_length([len(source) for source in ended], config.batch_tokens, most_rows):
            found = beam_search(
                model,
                _pad([ended[i] for i in batch], model.output_weight.device),
                beam_size=config.beam_size,
                length_penalty=config.length_penalty,
                max_len=longest,
                n_vocab=n_vocab,
                n_best=n_best,
            )
            for i, hypotheses in zip(batch, found, strict=True):
                results[i] = hypotheses
            n_done += len(batch)
            if on_progress is not None:
                on_progress(n_done, len(ended))
    finally:
        model.train(was_training)
    return results


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
