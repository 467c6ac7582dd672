"""The command `evaluate`: a run's model decodes a file, and its lines are scored against references."""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from dist_transformer.config import Metric, TextMetric
from dist_transformer.data.token_ids import EOS_ID, PAD_ID
from dist_transformer.errors import DataError
from dist_transformer.generate.ensemble import Scorer
from dist_transformer.generate.text import longest_sequence
from dist_transformer.scoring import Grouped, Score, group_by_source, score_texts
from dist_transformer.train.decode import decode_lines, read_lines, set_threads
from dist_transformer.train.trained_run import Choice, TrainedRun

_MOST_SCORES = 1 << 26
"""Scores over the vocabulary at the same time (256 MiB)."""
_MOST_PAIRS = 64


@dataclass(frozen=True)
class Scoring:
    """What `evaluate` measures; what is None is the run's own `evaluate` section's."""

    metrics: Sequence[Metric] | None = None
    tokenize: str | None = None
    lowercase: bool | None = None
    group_sources: bool | None = None
    ignore: str | None = None


def evaluate_files(
    path: Path,
    source: str,
    references: Sequence[str],
    output: str | None,
    decoding: Mapping[str, object],
    threads: int | None,
    scoring: Scoring | None = None,
    choice: Choice | None = None,
    objective: str | None = None,
) -> dict[str, Any]:
    """Decode a source file and score it.

    Args:
        references: files of as many lines; several are several right answers for each source.
        objective: which of a mixture's; None: pairs, if the run was trained for them, else its first corpus's.

    Returns:
        Every metric in percent, rounded to 2 digits; `loss`; `sentences` (sources that were decoded) and
        `references`; `signatures` by metric, and BLEU's as `signature`; `checkpoint`, its `weights` (`current` or
        `ema`), the names of those whose mean it is (`averaged`), and what decodes together with it (`ensemble`).

    Raises:
        DataError: if the files are not of one length, or empty, or the output cannot be written.
    """
    lines = _read_parallel(source, references)
    if output:
        check_writable("--output", output, [source, *references])
    set_threads(threads)
    run = TrainedRun(path, choice)
    asked, of_run = scoring or Scoring(), run.config.evaluate

    def option(name: str) -> Any:
        given = getattr(asked, name)
        return getattr(of_run, name) if given is None else given

    texts = group_by_source(lines.sources, lines.references) if option("group_sources") else lines
    if objective is None and any(corpus.objective == "pairs" for corpus in run.config.data.corpora()):
        objective = "pairs"
    outputs = decode_lines(run, texts.sources, decoding, objective)
    if output:
        _write("--output", Path(output), "".join(f"{line}\n" for line in outputs))
    metrics: Sequence[Metric] = option("metrics")
    of_text = [metric for metric in get_args(TextMetric) if metric in metrics]
    how = {name: option(name) for name in ("tokenize", "lowercase", "ignore")}
    scores = score_texts(outputs, texts.references, of_text, **how)
    pairs = [
        (text, reference)
        for text, group in zip(texts.sources, texts.references, strict=True)
        for reference in group
    ]
    return _result(run, scores, metrics, pairs, len(texts.sources))


def table(result: Mapping[str, Any]) -> str:
    """The figures of `evaluate_files` for a person: a metric a line, with its signature."""
    signatures = result["signatures"]
    figures = [(key, value) for key, value in result.items() if isinstance(value, float)]
    width = max(len(key) for key, _ in figures)
    lines = [
        f"{key:<{width}}  {value:>{8}.{4 if key == 'loss' else 2}f}  {signatures.get(key, '')}".rstrip()
        for key, value in figures
    ]
    n_sentences, n_references = result["sentences"], result["references"]
    which = result["checkpoint"] + (", moving average" if result["weights"] == "ema" else "")
    which += f", mean of {', '.join(result['averaged'])}" if result["averaged"] else ""
    which += f", together with {', '.join(result['ensemble'])}" if result["ensemble"] else ""
    return "\n".join([*lines, f"{n_sentences:,} sentences, {n_references:,} references, {which}"])


def write_result(result: Mapping[str, Any], path: Path) -> None:
    """Keep a result as JSON.

    Raises:
        DataError: it cannot be written.
    """
    _write("--out", path, json.dumps(result, ensure_ascii=False, indent=1) + "\n")


def check_writable(option: str, name: str, read: Sequence[str]) -> None:
    """Refuse what would be found out only after all decoding.

    Args:
        read: files that must not be written.

    Raises:
        DataError: it is one of them, or its folder is not there.
    """
    path = Path(name)
    if path.exists() and any(Path(other).exists() and path.samefile(other) for other in read):
        raise DataError(f"{option} {name} is a file that is read: give another one")
    if path.is_dir() or not path.parent.is_dir():
        raise DataError(f"{option} {name}: cannot be written: {path.parent} is no folder or it is one itself")


def _write(option: str, path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise DataError(f"{option} {path}: cannot be written: {error.strerror or error}") from None


def _read_parallel(source: str, references: Sequence[str]) -> Grouped:
    sources = read_lines(source)
    streams = [read_lines(name) for name in references]
    for name, stream in zip(references, streams, strict=True):
        if len(sources) != len(stream):
            raise DataError(
                f"{source} has {len(sources):,} lines and {name} {len(stream):,}: they must be parallel"
            )
    if not sources:
        raise DataError(f"{source} is empty: nothing to score")
    return Grouped(sources, [list(group) for group in zip(*streams, strict=True)])


def _result(
    run: TrainedRun,
    scores: Mapping[TextMetric, Score],
    metrics: Sequence[Metric],
    pairs: Sequence[tuple[str, str]],
    n_sentences: int,
) -> dict[str, Any]:
    forced = reference_scores(run, pairs)
    result: dict[str, Any] = {metric: round(score.value, 2) for metric, score in scores.items()}
    result |= {name: value for name, value in forced.items() if name == "loss" or name in metrics}
    if "bleu" in scores:
        result["signature"] = scores["bleu"].signature
    return result | {
        "signatures": {metric: score.signature for metric, score in scores.items()},
        "sentences": n_sentences,
        "references": len(pairs),
        "checkpoint": run.checkpoint.name,
        "weights": run.weights,
        "averaged": run.averaged,
        "ensemble": run.ensemble,
    }


def reference_scores(run: TrainedRun, pairs: Sequence[tuple[str, str]]) -> dict[str, float]:
    """What the model makes of the references: `loss` in nats per target token, end of sentence counted; the share of
    their tokens that have the largest probability after those before them, and of references that have only such, in
    percent (`token_accuracy`, `sequence_accuracy`).
    """
    encoded = _encoded(run, pairs)
    total, n_tokens, n_correct, n_right = 0.0, 0, 0, 0
    with torch.inference_mode():
        for group in _groups(encoded, _MOST_SCORES // (run.scorer.vocab_size * (1 + len(run.ensemble)))):
            source_BS = _padded([source for source, _ in group], run.device)
            target_BT = _padded([target for _, target in group], run.device)
            log_p_BT, is_largest_BT = _of_targets(run.scorer, source_BS, target_BT)
            counts_BT = target_BT != PAD_ID
            total -= float((log_p_BT.double() * counts_BT).sum())
            n_tokens += int(counts_BT.sum())
            n_correct += int((is_largest_BT & counts_BT).sum())
            n_right += int((is_largest_BT | ~counts_BT).all(dim=1).sum())
    return {
        "loss": round(total / max(1, n_tokens), 4),
        "token_accuracy": round(100 * n_correct / max(1, n_tokens), 2),
        "sequence_accuracy": round(100 * n_right / max(1, len(pairs)), 2),
    }


def _encoded(run: TrainedRun, pairs: Sequence[tuple[str, str]]) -> list[tuple[list[int], list[int]]]:
    """Ids of both sides with EOS, short ones first; what is beyond the run's rows is left out, and that is said."""
    data = run.config.data
    limits = [longest_sequence(run.scorer, limit) for limit in (data.max_source_len, data.max_target_len)]
    whole = [(run.tokenizer.encode(source), run.tokenizer.encode(reference)) for source, reference in pairs]
    if n_cut := sum(len(reference) >= limits[1] for _, reference in whole):
        print(
            f"dist-transformer: {n_cut:,} of {len(pairs):,} references are longer than {limits[1]} tokens, EOS "
            "counted: loss and accuracies count what fits; scores of texts count all",
            file=sys.stderr,
        )
    cut = [
        ([*source[: limits[0] - 1], EOS_ID], [*reference[: limits[1] - 1], EOS_ID])
        for source, reference in whole
    ]
    return sorted(cut, key=lambda pair: len(pair[0]) + len(pair[1]))


def _groups(
    pairs: Sequence[tuple[list[int], list[int]]], most_targets: int
) -> Iterator[list[tuple[list[int], list[int]]]]:
    """Neighbours, up to `_MOST_PAIRS` and so many target positions, padding counted; at least one."""
    group: list[tuple[list[int], list[int]]] = []
    width = 0
    for pair in pairs:
        width = max(width, len(pair[1]))
        if group and (len(group) == _MOST_PAIRS or (len(group) + 1) * width > most_targets):
            yield group
            group, width = [], len(pair[1])
        group.append(pair)
    if group:
        yield group


def _of_targets(scorer: Scorer, source_BS: Tensor, target_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Each target's log-probability after those before it, and whether it is the largest: [B, T]."""
    input_BT = torch.cat([torch.full_like(target_BT[:, :1], PAD_ID), target_BT[:, :-1]], dim=1)
    scores_BTV = scorer.step(input_BT, scorer.start(source_BS))
    log_p_BTV = scores_BTV.log_softmax(dim=-1, dtype=torch.float32)
    log_p_BT = log_p_BTV.gather(2, target_BT[:, :, None]).squeeze(2)
    return log_p_BT, log_p_BT == log_p_BTV.amax(dim=-1)


def _padded(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    width = max(len(row) for row in rows)
    return torch.tensor([[*row, *[PAD_ID] * (width - len(row))] for row in rows], device=device)
