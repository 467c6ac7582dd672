"""Beam search: sentences a second here and with Hugging Face's `generate`, on the same cores and weights.

    python benchmarks/decode.py RUN_DIR --source FILE [--beam-size 5] [--repeats 5] [--cores 2] [--json FILE]

The run is exported (`dist-transformer export`) and loaded by Hugging Face as a user would. Both sides get the same
encoded sentences, in batches of similar length by the same rule, and decode with the same beam, length penalty, limit
and stopping rule, in fp32. Each is tried in one process with as many threads as cores, and in as many processes with
one thread; each with several sizes of batches, of which its fastest counts. Repeats are interleaved, so that other work
on the machine meets all alike; medians are compared. Processor seconds of all processes stand beside, which others'
work changes less. Outputs must be the same token for token.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

OURS, THEIRS = "ours", "huggingface"


class Side:
    """One side's model in one process."""

    def __init__(self, name: str, run_dir: Path, exported: Path, threads: int, beam_size: int) -> None:
        import torch

        from dist_transformer.train.trained_run import TrainedRun

        torch.set_num_threads(threads)
        self.name = name
        run = TrainedRun(run_dir)
        self.tokenizer, self.data = run.tokenizer, run.config.data
        self.config = run.config.generate.model_copy(
            update={
                "beam_size": beam_size,
                "stop": "estimate",
                "sample": False,
                "min_len": 0,
                "max_ratio": None,
            }
        )
        self.model: Any = run.model
        self.n_rows = run.model.vocab_size
        if name == THEIRS:
            from transformers import AutoModelForSeq2SeqLM

            self.model = AutoModelForSeq2SeqLM.from_pretrained(exported).eval()

    def decode(self, sources: Sequence[list[int]], batch_tokens: int) -> list[list[int]]:
        """Output tokens without EOS."""
        return self._ours(sources, batch_tokens) if self.name == OURS else self._theirs(sources, batch_tokens)

    def _ours(self, sources: Sequence[list[int]], batch_tokens: int) -> list[list[int]]:
        from dist_transformer.generate.text import search_sources

        found = search_sources(
            self.model,
            sources,
            self.config.model_copy(update={"batch_tokens": batch_tokens}),
            n_vocab=self.tokenizer.vocab_size,
            max_source_len=self.data.max_source_len,
            max_target_len=self.data.max_target_len,
        )
        return [hypotheses[0].tokens for hypotheses in found]

    def _theirs(self, sources: Sequence[list[int]], batch_tokens: int) -> list[list[int]]:
        import torch

        from dist_transformer.data.token_ids import EOS_ID, PAD_ID
        from dist_transformer.generate.text import batches_by_length

        rows = [[*source[: self.data.max_source_len - 1], EOS_ID] for source in sources]
        outputs: list[list[int]] = [[] for _ in rows]
        for batch in batches_by_length([len(row) for row in rows], batch_tokens, len(rows)):
            width = max(len(rows[i]) for i in batch)
            tokens = torch.tensor([rows[i] + [PAD_ID] * (width - len(rows[i])) for i in batch])
            with torch.inference_mode():
                found = self.model.generate(
                    input_ids=tokens,
                    attention_mask=(tokens != PAD_ID).long(),
                    num_beams=self.config.beam_size,
                    length_penalty=self.config.length_penalty,
                    early_stopping=False,
                    max_new_tokens=self.config.max_len or self.data.max_target_len,
                    suppress_tokens=[PAD_ID, *range(self.tokenizer.vocab_size, self.n_rows)],
                    forced_eos_token_id=None,
                    do_sample=False,
                )
            for i, output in zip(batch, found[:, 1:].tolist(), strict=True):
                end = next((k for k, token in enumerate(output) if token in (EOS_ID, PAD_ID)), len(output))
                outputs[i] = output[:end]
        return outputs


def serve(pipe: Connection, *arguments: Any) -> None:
    """A process that decodes what it is sent."""
    sides = {name: Side(name, *arguments) for name in (OURS, THEIRS)}
    pipe.send(len(sides))
    while (task := pipe.recv()) is not None:
        name, sources, batch_tokens = task
        started = time.process_time()
        outputs = sides[name].decode(sources, batch_tokens)
        pipe.send((outputs, time.process_time() - started))


class Team:
    """Processes that decode together, loaded once: what is timed is decoding alone."""

    def __init__(self, n_processes: int, threads: int, *arguments: Any) -> None:
        self.label = f"{n_processes} x {threads} thread{'s' if threads > 1 else ''}"
        context = multiprocessing.get_context("spawn")
        self.pipes: list[Connection] = []
        for _ in range(n_processes):
            pipe, other = context.Pipe()
            run_dir, exported, beam_size = arguments
            context.Process(
                target=serve, args=(other, run_dir, exported, threads, beam_size), daemon=True
            ).start()
            self.pipes.append(pipe)
        for pipe in self.pipes:
            pipe.recv()

    def end(self) -> None:
        """Let the processes end."""
        for pipe in self.pipes:
            pipe.send(None)

    def decode(
        self, name: str, sources: list[list[int]], batch_tokens: int
    ) -> tuple[list[list[int]], float, float]:
        """Outputs, seconds, and processor seconds."""
        n = len(self.pipes)
        order = sorted(range(len(sources)), key=lambda i: -len(sources[i]))
        started = time.perf_counter()
        for i, pipe in enumerate(self.pipes):
            pipe.send((name, [sources[k] for k in order[i::n]], batch_tokens))
        outputs: list[list[int]] = [[] for _ in sources]
        cpu_s = 0.0
        for i, pipe in enumerate(self.pipes):
            found, seconds = pipe.recv()
            cpu_s += seconds
            for k, output in zip(order[i::n], found, strict=True):
                outputs[k] = output
        return outputs, time.perf_counter() - started, cpu_s


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--source", type=Path, required=True)
    parser.add_argument("--sentences", type=int, help="the first so many (default: all)")
    parser.add_argument("--beam-size", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--cores", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--batch-tokens", type=int, nargs="+", default=[512, 1024, 2048, 4096])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    from dist_transformer.interop.export import export_run
    from dist_transformer.train.trained_run import TrainedRun

    run = TrainedRun(options.run_dir)
    lines = options.source.read_text(encoding="utf-8").splitlines()[: options.sentences]
    sources = run.tokenizer.encode_batch(lines)
    with tempfile.TemporaryDirectory() as folder:
        exported = Path(folder) / "huggingface"
        exported.mkdir()
        export_run(run.model, run.config, run.tokenizer, exported, "huggingface")
        arguments = (options.run_dir, exported, options.beam_size)
        shapes = sorted({(1, options.cores), (options.cores, 1)})
        teams = [Team(n, threads, *arguments) for n, threads in shapes]
        result = measure(teams, sources, options.batch_tokens, options.repeats)
        for team in teams:
            team.end()
    result |= {"beam_size": options.beam_size, "sentences": len(sources), "cores": options.cores}
    show(result, len(sources))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if result["different"]:
        sys.exit(f"{result['different']} outputs differ between the two")


def measure(
    teams: Sequence[Team], sources: list[list[int]], sizes: Sequence[int], repeats: int
) -> dict[str, Any]:
    """Times of every case, `repeats` rounds in turn; a short one before them warms all up."""
    cases = [(team, name, size) for size in sizes for team in teams for name in (OURS, THEIRS)]
    times: dict[tuple[str, str, int], list[tuple[float, float]]] = {}
    outputs: dict[str, list[list[int]]] = {}
    different = 0
    for team, name, _ in cases[: 2 * len(teams)]:
        team.decode(name, sources[:100], sizes[0])
    for _ in range(repeats):
        for team, name, size in cases:
            found, wall_s, cpu_s = team.decode(name, sources, size)
            times.setdefault((team.label, name, size), []).append((wall_s, cpu_s))
            expected = outputs.setdefault("all", found)
            different = max(different, sum(a != b for a, b in zip(found, expected, strict=True)))
    rows = [
        {
            "processes": label,
            "side": name,
            "batch_tokens": size,
            "sentences_per_s": round(len(sources) / statistics.median(wall for wall, _ in measured), 1),
            "cpu_s": round(statistics.median(cpu for _, cpu in measured), 2),
            "wall_s": [round(wall, 3) for wall, _ in measured],
        }
        for (label, name, size), measured in times.items()
    ]
    return {"rows": rows, "different": different, "repeats": repeats}


def show(result: dict[str, Any], n_sentences: int) -> None:
    """Every case, and each side's best against the other's."""
    print(f"beam {result['beam_size']}, {n_sentences:,} sentences, median of {result['repeats']}")
    print(f"{'processes':14} {'side':12} {'batch tokens':>12} {'sentences/s':>12} {'CPU s':>8}")
    for row in sorted(result["rows"], key=lambda row: (row["processes"], row["side"], row["batch_tokens"])):
        print(
            f"{row['processes']:14} {row['side']:12} {row['batch_tokens']:12,} "
            f"{row['sentences_per_s']:12,.1f} {row['cpu_s']:8.2f}"
        )
    best = {
        (label, side): max(
            row["sentences_per_s"]
            for row in result["rows"]
            if row["side"] == side and label in (row["processes"], "any")
        )
        for side in (OURS, THEIRS)
        for label in ("any", *sorted({row["processes"] for row in result["rows"]}))
    }
    least_cpu = {
        side: min(r["cpu_s"] for r in result["rows"] if r["side"] == side) for side in (OURS, THEIRS)
    }
    ratios = {
        label: round(best[label, OURS] / best[label, THEIRS], 2) for label, side in best if side == OURS
    }
    result["ratios"] = ratios | {"cpu": round(least_cpu[THEIRS] / least_cpu[OURS], 2)}
    print("sentences/s, ours : Hugging Face, each at its best:")
    for label, ratio in result["ratios"].items():
        print(f"  {label:14} {ratio:.2f} x")


if __name__ == "__main__":
    main()
