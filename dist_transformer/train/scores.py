"""The command `evaluate`: a run's model decodes a file, and its lines are scored against references."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from dist_transformer.data.batch import EOS_ID, PAD_ID
from dist_transformer.errors import DataError
from dist_transformer.parallel.cross_entropy import linear_cross_entropy
from dist_transformer.train.decode import decode_lines, read_lines, set_threads
from dist_transformer.train.evaluate import score_texts
from dist_transformer.train.trained_run import TrainedRun


def evaluate_files(
    path: Path,
    source: str,
    reference: str,
    output: str | None,
    decoding: Mapping[str, object],
    threads: int | None,
) -> dict[str, float | int | str]:
    """Decode a source file and score it: BLEU and chrF with sacreBLEU's signature, and the references' loss.

    Raises:
        DataError: if the files are not of one length.
    """
    sources, references = read_lines(source), read_lines(reference)
    if len(sources) != len(references):
        raise DataError(
            f"{source} has {len(sources):,} lines and {reference} {len(references):,}: they must be parallel"
        )
    if not sources:
        raise DataError(f"{source} is empty: nothing to score")
    set_threads(threads)
    run = TrainedRun(path)
    outputs = decode_lines(run, sources, decoding)
    if output:
        Path(output).write_text("".join(f"{line}\n" for line in outputs), encoding="utf-8")
    return {
        **_scores(outputs, references),
        "loss": _reference_loss(run, sources, references),
        "sentences": len(sources),
    }


def _scores(outputs: Sequence[str], references: Sequence[str]) -> dict[str, float | int | str]:
    import sacrebleu

    bleu = sacrebleu.metrics.BLEU()
    bleu.corpus_score(list(outputs), [list(references)])
    scores = score_texts(outputs, references)
    return {
        "bleu": round(scores["bleu"], 2),
        "chrf": round(scores["chrf"], 2),
        "signature": str(bleu.get_signature()),
    }


def _reference_loss(run: TrainedRun, sources: Sequence[str], references: Sequence[str]) -> float:
    """Nats per target token of the references, end of sentence counted."""
    data, device = run.config.data, run.device
    pairs = sorted(
        (
            (
                run.tokenizer.encode(s)[: data.max_source_len - 1],
                run.tokenizer.encode(r)[: data.max_target_len - 1],
            )
            for s, r in zip(sources, references, strict=True)
        ),
        key=lambda pair: len(pair[0]) + len(pair[1]),
    )
    total, n_tokens = 0.0, 0
    with torch.inference_mode():
        for start in range(0, len(pairs), 64):
            group = pairs[start : start + 64]
            source_BS = _padded([s + [EOS_ID] for s, _ in group], device)
            target_BT = _padded([t + [EOS_ID] for _, t in group], device)
            input_BT = torch.cat([torch.full_like(target_BT[:, :1], PAD_ID), target_BT[:, :-1]], dim=1)
            hidden = run.model(
                source_BS,
                (source_BS != PAD_ID).int(),
                torch.arange(source_BS.shape[1], device=device).expand_as(source_BS),
                input_BT,
                torch.ones_like(target_BT),
                torch.arange(target_BT.shape[1], device=device).expand_as(target_BT),
            )
            loss = linear_cross_entropy(
                hidden.flatten(0, 1), run.model.output_weight, target_BT.flatten(), ignore_id=PAD_ID
            )
            total += float(loss.cross_entropy)
            n_tokens += int(loss.n_tokens)
    return round(total / max(1, n_tokens), 4)


def _padded(rows: Sequence[Sequence[int]], device: torch.device) -> torch.Tensor:
    width = max(len(row) for row in rows)
    return torch.tensor([[*row, *[PAD_ID] * (width - len(row))] for row in rows], device=device)
