"""A run's model on text: `generate` and `evaluate` on one process, from a checkpoint of any ZeRO stage."""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import find_executable_batch_size

from dist_transformer.checkpoints.folder import latest_checkpoint
from dist_transformer.checkpoints.reader import load_weights
from dist_transformer.config import Config, load_config
from dist_transformer.data.batch import EOS_ID, PAD_ID
from dist_transformer.data.tokenizer import TextTokenizer
from dist_transformer.errors import CheckpointError, ConfigError, DataError
from dist_transformer.generate.spans import Filled, fill_texts
from dist_transformer.generate.text import Generated, continue_texts, describe_truncated, generate_texts
from dist_transformer.model import EncoderDecoder, build_model
from dist_transformer.parallel.cross_entropy import linear_cross_entropy
from dist_transformer.train.evaluate import score_texts


class TrainedRun:
    """A run's newest checkpoint (or a given one) as a model, with its tokenizer and configuration.

    Raises:
        CheckpointError: if there is no run, no checkpoint, or it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        checkpoint = path if (path / "trainer.json").exists() else latest_checkpoint(path)
        run_dir = path.parent.parent if checkpoint == path else path
        if not (run_dir / "config.yaml").exists():
            raise CheckpointError(f"{run_dir}: no run there: config.yaml is missing")
        if checkpoint is None:
            raise CheckpointError(f"{run_dir}: no checkpoint yet")
        self.config: Config = load_config(run_dir / "config.yaml")
        self.tokenizer = TextTokenizer.load(run_dir / "tokenizer.json")
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model: EncoderDecoder = build_model(self.config.model).to_empty(device=self.device)
        weights = load_weights(checkpoint)
        try:
            self.model.load_state_dict(weights)
        except RuntimeError as error:
            raise CheckpointError(f"{checkpoint} does not fit {run_dir / 'config.yaml'}: {error}") from None
        self.model.eval()


def generate_lines(
    path: Path, input_: str | None, output: str | None, decoding: Mapping[str, object], threads: int | None
) -> None:
    """Read lines, write one line for each: its gaps (`___`) filled by a denoising model, continued by one that was
    pretrained on prefixes, else the translation.
    """
    _set_threads(threads)
    run = TrainedRun(path)
    with contextlib.ExitStack() as stack:
        lines = _read_lines(input_) if input_ else _read_stdin()
        destination = stack.enter_context(open(output, "w", encoding="utf-8")) if output else sys.stdout  # noqa: PTH123
        for text in _decode(run, lines, decoding):
            destination.write(f"{text}\n")


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
    sources, references = _read_lines(source), _read_lines(reference)
    if len(sources) != len(references):
        raise DataError(
            f"{source} has {len(sources):,} lines and {reference} {len(references):,}: they must be parallel"
        )
    if not sources:
        raise DataError(f"{source} is empty: nothing to score")
    _set_threads(threads)
    run = TrainedRun(path)
    outputs = _decode(run, sources, decoding)
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


def _decode(run: TrainedRun, lines: Sequence[str], decoding: Mapping[str, object]) -> list[str]:
    """One output line for each input line; batches shrink where memory does not suffice."""
    config = run.config.generate.model_copy(update=dict(decoding))
    lengths: dict[str, Any] = {
        "max_source_len": run.config.data.max_source_len,
        "max_target_len": run.config.data.max_target_len,
    }
    write = _writer(run)

    @find_executable_batch_size(starting_batch_size=config.batch_tokens)  # type: ignore[untyped-decorator]
    def attempt(batch_tokens: int) -> Sequence[Generated | Filled]:
        return write(
            run.model,
            run.tokenizer,
            lines,
            config.model_copy(update={"batch_tokens": batch_tokens}),
            **lengths,
        )

    results: Sequence[Generated | Filled] = attempt()
    if warning := describe_truncated([result.n_cut for result in results], run.config.data.max_source_len):
        print(f"dist-transformer: {warning}", file=sys.stderr)
    # One line for one line, whatever the model writes.
    return [" ".join(result.text.splitlines()) for result in results]


def _writer(run: TrainedRun) -> Callable[..., Sequence[Generated | Filled]]:
    """What the run's model was trained to do with a text; that of the first corpus of a mixture."""
    data = run.config.data
    objective = data.corpora()[0].objective
    if objective == "pairs":
        return generate_texts
    if objective == "prefix_lm":
        return continue_texts
    if objective != "ul2":
        return fill_texts
    mode = next((denoiser.mode for denoiser in data.denoisers if denoiser.mode != "S"), "S")
    mode_id = run.tokenizer.mode_ids[mode] if data.mode_tokens else None
    return partial(continue_texts if mode == "S" else fill_texts, mode_id=mode_id)


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


def _read_lines(name: str) -> list[str]:
    """Lines of a text file, without their ends."""
    try:
        return list(_lines(Path(name)))
    except OSError as error:
        raise ConfigError(f"{name}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{name}: not UTF-8 at byte {error.start}") from None


def _read_stdin() -> list[str]:
    try:
        return [line.decode("utf-8").rstrip("\r\n") for line in sys.stdin.buffer]
    except UnicodeDecodeError as error:
        raise DataError(f"standard input: not UTF-8 at byte {error.start} of a line") from None


def _lines(path: Path) -> Iterator[str]:
    import gzip

    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as stream:
        for line in stream:
            yield line.decode("utf-8").rstrip("\r\n")


def _set_threads(threads: int | None) -> None:
    torch.set_num_threads(threads or os.cpu_count() or 1)
