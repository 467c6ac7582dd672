"""Evaluation on held-out data: loss over packed rows, BLEU and samples over decoded text."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, get_args

import torch
from torch import Tensor

from dist_transformer.config import Config, CorpusConfig, DataConfig, TextMetric, TokenMetric
from dist_transformer.config.data import metric_name
from dist_transformer.data.batch import Batch
from dist_transformer.data.held_out import eval_batches, held_out_texts
from dist_transformer.data.token_ids import EOS_ID
from dist_transformer.data.tokenizer import TextTokenizer
from dist_transformer.engine.engine import Engine
from dist_transformer.errors import DataError
from dist_transformer.generate.search import Hypothesis
from dist_transformer.generate.text import search_sources
from dist_transformer.parallel.collectives import (
    gather_objects,
    raise_together,
    sum_over_data_parallel,
    sum_over_ranks,
)
from dist_transformer.parallel.cross_entropy import TokenLoss
from dist_transformer.parallel.mesh import Mesh
from dist_transformer.scoring import group_by_source, score_texts


@dataclass(frozen=True)
class Sample:
    """One decoded held-out example."""

    source: str
    output: str
    references: tuple[str, ...]

    @property
    def reference(self) -> str:
        """The first of them."""
        return self.references[0]


class EvaluationInterruptedError(Exception):
    """The run is to stop before the evaluation has ended. Raised on every rank; nothing of it is kept."""


class StopWishes(Protocol):
    """Who asks a run to stop."""

    @property
    def stop_requested(self) -> bool:
        """Whether this rank knows of a wish to stop."""

    @property
    def stop_is_known(self) -> bool:
        """Whether it has come in a way in which every rank learns of it by itself."""


@dataclass(frozen=True)
class Evaluation:
    """What one evaluation found; the same on every rank."""

    metrics: dict[str, float]
    """`eval/<set>/...` by name."""
    signatures: dict[str, str]
    """`eval/<set>/<metric>_signature`: how each score of texts counts."""
    samples: dict[str, list[Sample]]
    """By set."""
    problems: list[str]
    """Sentences about sets that could not be read (policy `skip`): they have no metrics."""


def evaluate(
    engine: Engine, config: Config, tokenizer: TextTokenizer, wishes: StopWishes | None = None
) -> Evaluation:
    """Evaluate the current weights on every held-out set. A collective.

    A set is measured whole or not at all: with `data.on_bad_shard=skip`, one that any rank cannot read is left
    out, by all ranks, and named.

    Raises:
        DataError: on every rank, if a set cannot be read by any and the policy is `error`.
        EvaluationInterruptedError: on every rank, if any is asked to stop. Looked for between batches; while texts are
            decoded, which each rank does by itself, only wishes count that all ranks learn of.
    """
    found = Evaluation({}, {}, {}, [])
    with _untouched_random_state(), engine.weights(config.evaluate.weights):
        for corpus in config.data.corpora():
            if corpus.eval is None:
                continue
            name = set_name(config.data, corpus)
            try:
                of_set = _evaluate_set(engine, config, corpus, tokenizer, wishes)
            except DataError as error:
                if config.data.on_bad_shard == "error":
                    raise
                found.problems.append(f"held-out set {name} is not evaluated: {error}")
                continue
            found.metrics.update({f"eval/{name}/{key}": value for key, value in of_set.values.items()})
            signatures = of_set.signatures.items()
            found.signatures.update({f"eval/{name}/{key}_signature": text for key, text in signatures})
            if of_set.samples:
                found.samples[name] = of_set.samples
    return found


@contextlib.contextmanager
def _untouched_random_state() -> Iterator[None]:
    """Evaluating more or less often must not change what training draws."""
    random_state = torch.get_rng_state()
    try:
        yield
    finally:
        torch.set_rng_state(random_state)


def measured(config: Config) -> list[str]:
    """The names of all figures that an evaluation of this run gives."""
    names = []
    for corpus in config.data.corpora():
        if corpus.eval is not None:
            metrics = ["loss", "accuracy", *_token_metrics(config), *_text_metrics(config, corpus)]
            names += [f"eval/{set_name(config.data, corpus)}/{metric}" for metric in metrics]
    return names


@dataclass
class _OfSet:
    values: dict[str, float]
    signatures: dict[str, str] = field(default_factory=dict)
    samples: list[Sample] = field(default_factory=list)


def _evaluate_set(
    engine: Engine, config: Config, corpus: CorpusConfig, tokenizer: TextTokenizer, wishes: StopWishes | None
) -> _OfSet:
    evaluate, metrics = config.evaluate, _text_metrics(config, corpus)
    found = _OfSet(_loss(engine, config, corpus, wishes))
    n_scored = evaluate.sentences if metrics else 0
    if n_sentences := max(evaluate.samples, n_scored):
        samples = _decode(engine, config, corpus, tokenizer, n_sentences, wishes)
        found.samples = samples[: evaluate.samples]
        if scored := samples[:n_scored]:
            outputs, references = [s.output for s in scored], [s.references for s in scored]
            scores = score_texts(
                outputs,
                references,
                metrics,
                tokenize=evaluate.tokenize,
                lowercase=evaluate.lowercase,
                ignore=evaluate.ignore,
            )
            found.values |= {metric: score.value for metric, score in scores.items()}
            found.signatures = {metric: score.signature for metric, score in scores.items()}
    return found


def _text_metrics(config: Config, corpus: CorpusConfig) -> list[TextMetric]:
    if corpus.objective != "pairs" or not config.evaluate.sentences:
        return []
    return [metric for metric in get_args(TextMetric) if metric in config.evaluate.metrics]


def _token_metrics(config: Config) -> list[TokenMetric]:
    return [metric for metric in get_args(TokenMetric) if metric in config.evaluate.metrics]


def set_name(data: DataConfig, corpus: CorpusConfig) -> str:
    """A held-out set's name in metrics: its folder's, or in a mixture the corpus's."""
    assert corpus.eval is not None and corpus.name is not None
    return metric_name(corpus.name if data.mixture else Path(corpus.eval).resolve().name)


def _loss(
    engine: Engine, config: Config, corpus: CorpusConfig, wishes: StopWishes | None
) -> dict[str, float]:
    mesh, limit = engine.mesh, config.evaluate.batches
    sums = torch.zeros(5, dtype=torch.float64, device=mesh.device)
    batches = eval_batches(
        config.data,
        corpus,
        seed=config.run.seed,
        dp_rank=mesh.dp_rank,
        dp_size=mesh.dp_size,
        micro_batch_size=config.train.micro_batch_size,
        max_rows=None if limit is None else limit * config.train.global_batch_size,
    )
    wanted = _token_metrics(config)
    for batch in _in_step(batches, mesh, wishes):
        loss = engine.evaluate_batch(batch)
        sums[:3] += torch.stack([loss.cross_entropy, loss.n_correct, loss.n_tokens]).double()
        if "sequence_accuracy" in wanted:
            sums[3:] += count_sequences(loss, batch.decoder_segment_ids)
    cross_entropy, n_correct, n_tokens, n_right, n_sequences = sum_over_data_parallel(sums, mesh).tolist()
    accuracy = n_correct / max(1.0, n_tokens)
    percent = {
        "token_accuracy": 100 * accuracy,
        "sequence_accuracy": 100 * n_right / max(1.0, n_sequences),
    }
    loss_per_token = cross_entropy / max(1.0, n_tokens)
    return {"loss": loss_per_token, "accuracy": accuracy, **{metric: percent[metric] for metric in wanted}}


def count_sequences(loss: TokenLoss, segment_ids_BT: Tensor) -> Tensor:
    """[2] float64: targets of which every token has the largest logit, and all targets.

    Args:
        segment_ids_BT: which sample of its row a target token belongs to, from 1; 0 is padding.
    """
    n_rows, length = segment_ids_BT.shape
    segments = segment_ids_BT.to(loss.is_correct.device).long()
    # Rows may have been padded, so that ranks share them equally.
    is_correct_BT = loss.is_correct.view(n_rows, -1)[:, :length]
    n_segments = int(segments.max()) + 1
    key_BT = segments + n_segments * torch.arange(n_rows, device=segments.device)[:, None]
    is_token, is_wrong = (
        torch.zeros(n_rows * n_segments, dtype=torch.bool, device=segments.device).index_fill_(
            0, key_BT[which], True
        )
        for which in (segments > 0, (segments > 0) & ~is_correct_BT)
    )
    return torch.stack([(is_token & ~is_wrong).sum(), is_token.sum()]).double()


def _in_step(batches: Iterator[Batch], mesh: Mesh, wishes: StopWishes | None) -> Iterator[Batch]:
    """The batches, as long as every rank has one.

    Raises:
        DataError: on every rank, if reading failed on any, or if their held-out sets differ in length.
        EvaluationInterruptedError: on every rank, if any is asked to stop.
    """
    while True:
        batch, error = None, None
        try:
            batch = next(batches, None)
        except DataError as problem:
            error = problem
        wants_stop = wishes is not None and wishes.stop_requested
        own = [error is not None, wants_stop, batch is None]
        flags = torch.tensor(own, dtype=torch.int64, device=mesh.device)
        n_failed, n_stop, n_without = sum_over_ranks(flags, mesh).tolist()
        if n_failed:
            raise_together(error, mesh)
        if n_stop:
            raise EvaluationInterruptedError
        if 0 < n_without < mesh.world_size:
            raise DataError("ranks see held-out sets of different lengths: give all nodes the same shards")
        if batch is None:
            return
        yield batch


def _decode(
    engine: Engine,
    config: Config,
    corpus: CorpusConfig,
    tokenizer: TextTokenizer,
    n_sentences: int,
    wishes: StopWishes | None,
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

    def leave_if_asked(*_: int) -> None:
        if wishes is not None and wishes.stop_is_known:
            raise EvaluationInterruptedError

    found: list[list[Hypothesis]] | None = None
    with engine.whole_model() as model, contextlib.suppress(EvaluationInterruptedError):
        found = search_sources(
            model,
            mine,
            config.generate,
            n_vocab=tokenizer.vocab_size,
            max_source_len=config.data.max_source_len,
            max_target_len=config.data.max_target_len,
            # Samples are functions of these, whatever the number of ranks.
            lines=range(mesh.dp_rank, len(examples), mesh.dp_size),
            on_progress=leave_if_asked,
        )

    def decode(ids: Sequence[int]) -> str:
        return tokenizer.decode(ids, keep_sentinels=not is_pairs)

    # Ranks decode without each other, so that one may have left where others went on.
    mine_decoded = None if found is None else [decode(hypotheses[0].tokens) for hypotheses in found]
    gathered: list[list[str]] = []
    for of_rank in gather_objects(mine_decoded, mesh):
        if of_rank is None:
            raise EvaluationInterruptedError
        gathered.append(of_rank)
    outputs = [gathered[(i % mesh.dp_size) * mesh.tp_size][i // mesh.dp_size] for i in range(len(examples))]
    return [
        Sample(
            example.source or decode(example.source_ids),
            output,
            example.references or (decode(example.target_ids),),
        )
        for example, output in zip(examples, outputs, strict=True)
    ]


@dataclass(frozen=True)
class _Example:
    """What is decoded: ids without EOS, and the texts where they are known."""

    source_ids: list[int]
    target_ids: list[int]
    source: str = ""
    references: tuple[str, ...] = ()


def _held_out_pairs(
    config: Config, corpus: CorpusConfig, tokenizer: TextTokenizer, limit: int
) -> list[_Example]:
    is_grouped = config.evaluate.group_sources
    pairs = held_out_texts(config.data, corpus, None if is_grouped else limit)
    sources, references = [source for source, _ in pairs], [[target] for _, target in pairs]
    if is_grouped:
        grouped = group_by_source(sources, references)
        sources, references = grouped.sources[:limit], grouped.references[:limit]
    encoded = tokenizer.encode_batch(sources)
    return [
        _Example(ids, [], source, tuple(right))
        for ids, source, right in zip(encoded, sources, references, strict=True)
    ]


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
