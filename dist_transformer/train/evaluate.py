"""Evaluation on held-out data: loss over packed rows, BLEU and samples over decoded text."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from dist_transformer.config import Config, CorpusConfig, DataConfig
from dist_transformer.config.data import metric_name
from dist_transformer.data.batch import EOS_ID, Batch
from dist_transformer.data.held_out import eval_batches, held_out_texts
from dist_transformer.data.tokenizer import TextTokenizer
from dist_transformer.engine.engine import Engine
from dist_transformer.errors import DataError
from dist_transformer.generate.text import search_sources
from dist_transformer.parallel.collectives import (
    gather_objects,
    raise_together,
    sum_over_data_parallel,
    sum_over_ranks,
)
from dist_transformer.parallel.mesh import Mesh


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
    samples: dict[str, list[Sample]]
    """By set."""
    problems: list[str]
    """Sentences about sets that could not be read (policy `skip`): they have no metrics."""


def evaluate(engine: Engine, config: Config, tokenizer: TextTokenizer) -> Evaluation:
    """Evaluate the current weights on every held-out set. A collective.

    A set is measured whole or not at all: with `data.on_bad_shard=skip`, one that any rank cannot read is left
    out, by all ranks, and named.

    Raises:
        DataError: on every rank, if a set cannot be read by any and the policy is `error`.
    """
    random_state = torch.get_rng_state()
    found = Evaluation({}, {}, [])
    for corpus in config.data.corpora():
        if corpus.eval is None:
            continue
        name = set_name(config.data, corpus)
        try:
            metrics, samples = _evaluate_set(engine, config, corpus, tokenizer)
        except DataError as error:
            if config.data.on_bad_shard == "error":
                raise
            found.problems.append(f"held-out set {name} is not evaluated: {error}")
            continue
        found.metrics.update({f"eval/{name}/{key}": value for key, value in metrics.items()})
        if samples:
            found.samples[name] = samples
    # Evaluating more or less often must not change what training draws.
    torch.set_rng_state(random_state)
    return found


def _evaluate_set(
    engine: Engine, config: Config, corpus: CorpusConfig, tokenizer: TextTokenizer
) -> tuple[dict[str, float], list[Sample]]:
    metrics, samples = _loss(engine, config, corpus), []
    n_scored = config.evaluate.bleu_sentences if corpus.objective == "pairs" else 0
    if n_sentences := max(config.evaluate.samples, n_scored):
        samples = _decode(engine, config, corpus, tokenizer, n_sentences)
        if scored := samples[:n_scored]:
            metrics |= score_texts([s.output for s in scored], [s.reference for s in scored])
    return metrics, samples[: config.evaluate.samples]


def score_texts(outputs: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Corpus BLEU and chrF by sacreBLEU's defaults (cased, detokenised, 13a)."""
    import sacrebleu

    return {
        "bleu": sacrebleu.corpus_bleu(list(outputs), [list(references)]).score,
        "chrf": sacrebleu.corpus_chrf(list(outputs), [list(references)]).score,
    }


def set_name(data: DataConfig, corpus: CorpusConfig) -> str:
    """A held-out set's name in metrics: its folder's, or in a mixture the corpus's."""
    assert corpus.eval is not None and corpus.name is not None
    return metric_name(corpus.name if data.mixture else Path(corpus.eval).resolve().name)


def _loss(engine: Engine, config: Config, corpus: CorpusConfig) -> dict[str, float]:
    mesh, limit = engine.mesh, config.evaluate.batches
    sums = torch.zeros(3, dtype=torch.float64, device=mesh.device)
    batches = eval_batches(
        config.data,
        corpus,
        seed=config.run.seed,
        dp_rank=mesh.dp_rank,
        dp_size=mesh.dp_size,
        micro_batch_size=config.train.micro_batch_size,
        max_rows=None if limit is None else limit * config.train.global_batch_size,
    )
    for batch in _in_step(batches, mesh):
        loss = engine.evaluate_batch(batch)
        sums += torch.stack([loss.cross_entropy, loss.n_correct, loss.n_tokens]).double()
    cross_entropy, n_correct, n_tokens = sum_over_data_parallel(sums, mesh).tolist()
    return {
        "loss": cross_entropy / max(1.0, n_tokens),
        "accuracy": n_correct / max(1.0, n_tokens),
    }


def _in_step(batches: Iterator[Batch], mesh: Mesh) -> Iterator[Batch]:
    """The batches, as long as every rank has one.

    Raises:
        DataError: on every rank, if reading failed on any, or if their held-out sets differ in length.
    """
    while True:
        batch, error = None, None
        try:
            batch = next(batches, None)
        except DataError as problem:
            error = problem
        flags = torch.tensor([error is not None, batch is None], dtype=torch.int64, device=mesh.device)
        n_failed, n_without = sum_over_ranks(flags, mesh).tolist()
        if n_failed:
            raise_together(error, mesh)
        if 0 < n_without < mesh.world_size:
            raise DataError("ranks see held-out sets of different lengths: give all nodes the same shards")
        if batch is None:
            return
        yield batch


def _decode(
    engine: Engine, config: Config, corpus: CorpusConfig, tokenizer: TextTokenizer, n_sentences: int
) -> list[Sample]:
    """Decode the first held-out samples, shared out over data-parallel ranks."""
    mesh, is_pairs = engine.mesh, corpus.objective == "pairs"
    examples: list[_Example] = []
    error: DataError | None = None
    try:
        examples = (
            _held_out_pairs(config, corpus, tokenizer, n_sentences)
            if is_pairs
            else _corrupted(config, corpus, n_sentences)
        )
    except DataError as problem:
        error = problem
    raise_together(error, mesh)
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


def _held_out_pairs(
    config: Config, corpus: CorpusConfig, tokenizer: TextTokenizer, limit: int
) -> list[_Example]:
    pairs = held_out_texts(config.data, corpus, limit)
    sources = tokenizer.encode_batch([source for source, _ in pairs])
    return [_Example(ids, [], source, target) for ids, (source, target) in zip(sources, pairs, strict=True)]


def _corrupted(config: Config, corpus: CorpusConfig, limit: int) -> list[_Example]:
    """The first sample of each of the first held-out rows, corrupted as it is for the loss."""
    batches = eval_batches(
        config.data,
        corpus,
        seed=config.run.seed,
        dp_rank=0,
        dp_size=1,
        micro_batch_size=limit,
        max_rows=limit,
    )
    batch = next(iter(batches))
    examples = []
    # Buckets have a tensor row for each sample, so there may be more than asked for.
    for row in range(min(limit, len(batch.encoder_input_tokens))):
        source = batch.encoder_input_tokens[row][batch.encoder_segment_ids[row] == 1].tolist()
        target = batch.decoder_target_tokens[row][batch.decoder_segment_ids[row] == 1].tolist()
        if source:
            examples.append(_Example([i for i in source if i != EOS_ID], [i for i in target if i != EOS_ID]))
    return examples
