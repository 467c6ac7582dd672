"""Does an exported model do what ours does? On the sentences of a file, in one process, in float32.

    python benchmarks/interop.py runs/translate_multi30k test2016.en --sentences 200

Exports the run by the public command, then prints one JSON object: of how many sentences the tokens are the same in
Hugging Face's `generate` (beam search as the run is configured) and in CTranslate2 (greedy), the largest difference of
logits relative to their standard deviation, and whether importing gives the weights back bit for bit.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dist_transformer.checkpoints.folder import latest_checkpoint
from dist_transformer.checkpoints.reader import load_weights
from dist_transformer.generate.search import beam_search
from dist_transformer.train.trained_run import TrainedRun


def main() -> None:
    """Compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("source", type=Path, help="one sentence a line")
    parser.add_argument("--sentences", type=int, default=200)
    options = parser.parse_args()
    lines = [line for line in options.source.read_text(encoding="utf-8").splitlines() if line.strip()]
    run = TrainedRun(options.run_dir)
    run.model.cpu()
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(compare(run, options.run_dir, lines[: options.sentences], Path(folder)), indent=1))


def compare(run: TrainedRun, run_dir: Path, lines: list[str], folder: Path) -> dict[str, Any]:
    """All figures."""
    import ctranslate2
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    for target in ("huggingface", "ctranslate2"):
        _command("export", run_dir, folder / target, "--to", target)
    _command("import", folder / "huggingface", folder / "imported")
    imported = latest_checkpoint(folder / "imported")
    assert imported is not None
    back, weights = load_weights(imported), dict(run.model.named_parameters())
    is_identical = back.keys() == weights.keys() and all(torch.equal(back[n], weights[n]) for n in weights)

    tokenizer = AutoTokenizer.from_pretrained(folder / "huggingface")
    theirs = AutoModelForSeq2SeqLM.from_pretrained(folder / "huggingface").eval()
    encoded = tokenizer(lines, padding=True, return_tensors="pt")
    sources = [[*run.tokenizer.encode(line), run.tokenizer.eos_id] for line in lines]
    same_ids = [row[: len(s)].tolist() == s for row, s in zip(encoded.input_ids, sources, strict=True)]
    ours = {n: _ours(run, encoded.input_ids, n) for n in (1, run.config.generate.beam_size)}
    with torch.no_grad():
        outputs = theirs.generate(**encoded)
    beams = [_plain(row[1:].tolist()) for row in outputs]
    translator = ctranslate2.Translator(str(folder / "ctranslate2"), device="cpu", compute_type="float32")
    greedy = translator.translate_batch(
        [tokenizer.convert_ids_to_tokens(source) for source in sources],
        beam_size=1,
        max_decoding_length=_max_len(run),
        min_decoding_length=0,
    )
    greedy_ids = [tokenizer.convert_tokens_to_ids(result.hypotheses[0]) for result in greedy]
    return {
        "model": type(theirs).__name__,
        "sentences": len(lines),
        "import is bit-identical": is_identical,
        "same source ids": sum(same_ids),
        "largest difference of logits / their standard deviation": _logits_error(
            run, theirs, encoded, outputs
        ),
        "same tokens as Hugging Face, beam search": _n_equal(ours[run.config.generate.beam_size], beams),
        "same tokens as CTranslate2, greedy": _n_equal(ours[1], greedy_ids),
    }


def _ours(run: TrainedRun, sources: Tensor, beam_size: int) -> list[list[int]]:
    found = beam_search(
        run.model,
        sources,
        beam_size=beam_size,
        length_penalty=run.config.generate.length_penalty,
        max_len=_max_len(run),
        n_vocab=run.tokenizer.vocab_size,
    )
    return [hypotheses[0].tokens for hypotheses in found]


def _max_len(run: TrainedRun) -> int:
    return run.config.generate.max_len or run.config.data.max_target_len


def _plain(tokens: list[int]) -> list[int]:
    """Up to EOS or padding."""
    return tokens[: next((i for i, token in enumerate(tokens) if token in (0, 1)), len(tokens))]


def _n_equal(ours: list[list[int]], theirs: list[list[int]]) -> int:
    return sum(a == b for a, b in zip(ours, theirs, strict=True))


@torch.no_grad()
def _logits_error(run: TrainedRun, theirs: Any, encoded: Any, outputs: Tensor) -> float:
    """On the translations that beam search found, padding of both sides included in the batch."""
    source, target = encoded.input_ids, outputs[:, :-1]
    expected = theirs(
        input_ids=source, attention_mask=encoded.attention_mask, decoder_input_ids=target
    ).logits
    places = torch.arange(max(source.shape[1], target.shape[1])).expand(len(source), -1)
    hidden = run.model(
        source,
        encoded.attention_mask.int(),
        places[:, : source.shape[1]],
        target,
        torch.ones_like(target),
        places[:, : target.shape[1]],
    )
    return float((run.model.logits(hidden) - expected).abs().max() / expected.std())


def _command(*arguments: object) -> None:
    subprocess.run(
        [sys.executable, "-m", "dist_transformer", *map(str, arguments)], check=True, stdout=sys.stderr
    )


if __name__ == "__main__":
    main()
