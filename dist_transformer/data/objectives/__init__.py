"""Objectives: what a model learns to do with the samples of a shard."""

from dist_transformer.config.data import CorpusConfig, DataConfig
from dist_transformer.data.objectives.base import Fields, Objective, Pieces, Samples, Window
from dist_transformer.data.objectives.denoisers import Denoiser
from dist_transformer.data.objectives.denoising import Denoising
from dist_transformer.data.objectives.pairs import Pairs
from dist_transformer.data.tokenizer import TextTokenizer
from dist_transformer.errors import DataError

__all__ = [
    "Denoiser",
    "Denoising",
    "Fields",
    "Objective",
    "Pairs",
    "Pieces",
    "Samples",
    "Window",
    "build_objective",
]


def build_objective(data: DataConfig, corpus: CorpusConfig, tokenizer: TextTokenizer) -> Objective:
    """The objective of a corpus, one of `data.corpora()`.

    Raises:
        DataError: the rows are too short for it, or the tokenizer lacks tokens that it needs.
    """
    assert corpus.objective is not None
    if corpus.objective == "pairs":
        assert corpus.too_long is not None
        return Pairs(data.max_source_len, data.max_target_len, corpus.too_long, tokenizer.eos_id)
    return Denoising(
        name=corpus.objective,
        denoisers=_denoisers(data, corpus, tokenizer),
        max_source_len=data.max_source_len,
        max_target_len=data.max_target_len,
        eos_id=tokenizer.eos_id,
        sentinel_ids=tokenizer.sentinel_ids,
    )


def _denoisers(data: DataConfig, corpus: CorpusConfig, tokenizer: TextTokenizer) -> tuple[Denoiser, ...]:
    if corpus.objective == "prefix_lm":
        return (Denoiser(0.5, None),)
    if corpus.objective == "span_corruption":
        assert corpus.noise_density is not None
        return (Denoiser(corpus.noise_density, corpus.mean_noise_span),)
    mode_ids: dict[str, int] = {}
    if data.mode_tokens:
        mode_ids = tokenizer.mode_ids
        if missing := sorted({denoiser.mode for denoiser in data.denoisers} - set(mode_ids)):
            tokens = " and ".join(f"[{mode}]" for mode in missing)
            raise DataError(
                f"data.objective=ul2: the tokenizer of {corpus.train} has no mode token {tokens}: set "
                "data.mode_tokens=false, or prepare with a tokenizer that this version trains (it has [R], [S] "
                "and [X])"
            )
    return tuple(Denoiser(d.density, d.mean_span, mode_ids.get(d.mode), d.weight) for d in data.denoisers)
