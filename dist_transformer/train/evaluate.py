"""Evaluation on held-out data: loss over packed rows, BLEU and samples over decoded text."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from dist_transformer.config import Config
from dist_transformer.data.stream import eval_batches, held_out_texts
from dist_transformer.data.tokenizer import TextTokenizer
from dist_transformer.engine.engine import Engine
from dist_transformer.generate.text import generate_texts
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
        "target_tokens": n_tokens,
    }


def _decode(engine: Engine, config: Config, tokenizer: TextTokenizer, n_sentences: int) -> list[Sample]:
    """Decode the first held-out samples, shared out over data-parallel ranks."""
    mesh = engine.mesh
    pairs = held_out_texts(config.data, n_sentences, seed=config.run.seed)
    mine = pairs[mesh.dp_rank :: mesh.dp_size]
    with engine.whole_model() as model:
        outputs = generate_texts(
            model,
            tokenizer,
            [source for source, _ in mine],
            config.generate,
            max_source_len=config.data.max_source_len,
            max_target_len=config.data.max_target_len,
        )
    gathered = gather_objects([output.text for output in outputs], mesh)
    samples = []
    for index, (source, reference) in enumerate(pairs):
        owner = (index % mesh.dp_size) * mesh.tp_size
        samples.append(Sample(source, gathered[owner][index // mesh.dp_size], reference))
    return samples
