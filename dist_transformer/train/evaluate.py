"""Evaluation on held-out data: loss over packed rows, BLEU and samples over decoded text."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from dist_transformer.config import Config
from dist_transformer.data.batch import EOS_ID
from dist_transformer.data.held_out import eval_batches, held_out_texts
from dist_transformer.data.tokenizer import TextTokenizer
from dist_transformer.engine.engine import Engine
from dist_transformer.generate.text import search_sources
from dist_transformer.parallel.collectives import gather_objects, sum_over_data_parallel


@dataclass(frozen=True)
class Sample:
    """One decoded held-out example."""

    source: str
    output: str
    reference: str


@dataclass(frozen=True)
class Evaluation:
    """What one evaluation found; the same on every rank."""

    metrics: dict[str, float]
    """`eval/<set>/...` by name."""
    samples: list[Sample]


def evaluate(engine: Engine, config: Config, tokenizer: TextTokenizer) -> Evaluation:
    """Evaluate the current weights. A collective."""
    name = set_name(config)
    random_state = torch.get_rng_state()
    metrics = {f"eval/{name}/{key}": value for key, value in _loss(engine, config).items()}
    samples: list[Sample] = []
    n_sentences = max(config.evaluate.samples, config.evaluate.bleu_sentences)
    if n_sentences:
        samples = _decode(engine, config, tokenizer, n_sentences)
        if config.evaluate.bleu_sentences and config.data.objective == "pairs":
            scored = samples[: config.evaluate.bleu_sentences]
            scores = score_texts([s.output for s in scored], [s.reference for s in scored])
            metrics[f"eval/{name}/bleu"] = scores["bleu"]
            metrics[f"eval/{name}/chrf"] = scores["chrf"]
    # Evaluating more or less often must not change what training draws.
    torch.set_rng_state(random_state)
    return Evaluation(metrics, samples[: config.evaluate.samples])


def score_texts(outputs: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Corpus BLEU and chrF by sacreBLEU's defaults (cased, detokenised, 13a)."""
    import sacrebleu

    return {
        "bleu": sacrebleu.corpus_bleu(list(outputs), [list(references)]).score,
        "chrf": sacrebleu.corpus_chrf(list(outputs), [list(references)]).score,
    }


def set_name(config: Config) -> str:
    """The held-out set's name in metrics: its folder's, in letters that every dashboard takes."""
    assert config.data.eval is not None
    return re.sub(r"[^A-Za-z0-9_]", "_", Path(config.data.eval).resolve().name) or "held_out"


def _loss(engine: Engine, config: Config) -> dict[str, float]:
    mesh, limit = engine.mesh, config.evaluate.batches
    sums = torch.zeros(3, dtype=torch.float64, device=mesh.device)
    batches = eval_batches(
        config.data,
        seed=config.run.seed,
        dp_rank=mesh.dp_rank,
        dp_size=mesh.dp_size,
        micro_batch_size=config.train.micro_batch_size,
        max_rows=None if limit is None else limit * config.train.global_batch_size,
    )
    for batch in batches:
        loss = engine.evaluate_batch(batch)
        sums += torch.stack([loss.cross_entropy, loss.n_correct, loss.n_tokens]).double()
    cross_entropy, n_correct, n_tokens = sum_over_data_parallel(sums, mesh).tolist()
    return {
        "loss": cross_entropy / max(1.0, n_tokens),
        "accuracy": n_correct / max(1.0, n_tokens),
    }


def _decode(engine: Engine, config: Config, tokenizer: TextTokenizer, n_sentences: int) -> list[Sample]:
    """Decode the first held-out samples, shared out over data-parallel ranks."""
    mesh, is_pairs = engine.mesh, config.data.objective == "pairs"
    examples = (
        _held_out_pairs(config, tokenizer, n_sentences) if is_pairs else _corrupted(config, n_sentences)
    )
    mine = [example.source_ids for example in examples[mesh.dp_rank :: mesh.dp_size]]
    with engine.whole_model() as model:
        found = search_sources(
            model,
            mine,
            config.generate,
            n_vocab=tokenizer.vocab_size,
            max_source_len=config.data.max_source_len,
            max_target_len=config.data.max_target_len,
        )

    def decode(ids: Sequence[int]) -> str:
        return tokenizer.decode(ids, keep_sentinels=not is_pairs)

    gathered = gather_objects([decode(hypotheses[0].tokens) for hypotheses in found], mesh)
    outputs = [gathered[(i % mesh.dp_size) * mesh.tp_size][i // mesh.dp_size] for i in range(len(examples))]
    return [
        Sample(
            example.source or decode(example.source_ids), output, example.target or decode(example.target_ids)
        )
        for example, output in zip(examples, outputs, strict=True)
    ]


@dataclass(frozen=True)
class _Example:
    """What is decoded: ids without EOS, and the texts where they are known."""

    source_ids: list[int]
    target_ids: list[int]
    source: str = ""
    target: str = ""


def _held_out_pairs(config: Config, tokenizer: TextTokenizer, limit: int) -> list[_Example]:
    pairs = held_out_texts(config.data, limit)
    sources = tokenizer.encode_batch([source for source, _ in pairs])
    return [_Example(ids, [], source, target) for ids, (source, target) in zip(sources, pairs, strict=True)]


def _corrupted(config: Config, limit: int) -> list[_Example]:
    """The first sample of each of the first held-out rows, corrupted as it is for the loss."""
    batches = eval_batches(
        config.data, seed=config.run.seed, dp_rank=0, dp_size=1, micro_batch_size=limit, max_rows=limit
    )
    batch = next(iter(batches))
    examples = []
    for row in range(limit):
        source = batch.encoder_input_tokens[row][batch.encoder_segment_ids[row] == 1].tolist()
        target = batch.decoder_target_tokens[row][batch.decoder_segment_ids[row] == 1].tolist()
        if source:
            examples.append(_Example([i for i in source if i != EOS_ID], [i for i in target if i != EOS_ID]))
    return examples
