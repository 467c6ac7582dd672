"""What DeepSpeed and the training loop cost beyond the model's own work.

    .venv/bin/python -m benchmarks.overhead --shards SHARDS [--shape small base] [--stages 0 1 2 3] [--steps 20]
    .venv/bin/python -m torch.distributed.run --standalone --nproc-per-node 2 -m benchmarks.overhead --shards SHARDS

Shards as for benchmarks/train.py. Two figures, each on the same rows:

- a step of the engine in each ZeRO stage beside one of a bare torch loop (on several ranks DistributedDataParallel)
  with the same model, loss, clipping and fused AdamW: steps in turn, medians, the ratio of the medians;
- of a run of the trainer, without evaluation, fingerprints and a dashboard: the share of its time that is spent outside
  forward, backward, optimizer and collectives.
"""

import argparse
import contextlib
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn

from benchmarks.shapes import SHAPES, read_pairs, target_len
from benchmarks.train import ROW_LEN, Setting, our_config
from dist_transformer.config import Config, load_config
from dist_transformer.config.layout import grad_accum_steps
from dist_transformer.data.batch import Batch
from dist_transformer.data.stream import TrainStream
from dist_transformer.engine.engine import Engine
from dist_transformer.engine.optim import build_optimizer, learning_rate
from dist_transformer.model import build_model
from dist_transformer.model.initialize import initialize
from dist_transformer.parallel.mesh import Mesh, open_mesh
from dist_transformer.parallel.objective import TrainingModule
from dist_transformer.parallel.regions import TensorParallel
from dist_transformer.train import trainer
from dist_transformer.train.agreement import agree
from dist_transformer.train.prepare_run import prepare_run


class BareLoop:
    """The model without DeepSpeed, trained as everyone does by hand."""

    def __init__(self, config: Config, mesh: Mesh) -> None:
        self.config, self.mesh = config, mesh
        model = build_model(config.model)
        initialize(model, config.run.seed, mesh.device)
        self.module: nn.Module = TrainingModule(model, config.train, TensorParallel.of(mesh, False))
        self.optimizer = build_optimizer(self.module, config.optimizer)
        if mesh.world_size > 1:
            self.module = nn.parallel.DistributedDataParallel(self.module)
        self.module.train()

    def step(self, batches: list[Batch], n_target_tokens: int, step: int) -> None:
        """Forward, backward, clip, update."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config.optimizer, step, self.config.train.steps)
        for batch in batches:
            loss = self.module(batch.to(self.mesh.device))
            (loss.objective * (self.mesh.dp_size / n_target_tokens)).backward()
        nn.utils.clip_grad_norm_(self.module.parameters(), self.config.train.clip or float("inf"))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def seconds_of(function: Callable[..., object], *arguments: object) -> float:
    """How long a call takes."""
    began = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - began


def compare(config: Config, mesh: Mesh, n_steps: int, n_warm_up: int = 3) -> tuple[float, float]:
    """(engine, bare loop): median seconds of a step, on the slowest rank."""
    config, _ = prepare_run(config, mesh)
    engine, bare = Engine(config, mesh), BareLoop(config, mesh)
    ours, theirs = [], []
    n_micro_steps = grad_accum_steps(config, mesh.dp_size)
    stream = TrainStream(
        config.data, seed=1, dp_rank=mesh.dp_rank, dp_size=mesh.dp_size,
        micro_batch_size=config.train.micro_batch_size,
    )  # fmt: skip
    with contextlib.closing(stream):
        batches = iter(stream)
        for step in range(1, n_warm_up + n_steps + 1):
            rows = [next(batches) for _ in range(n_micro_steps)]
            totals, _, _ = agree(rows, None, False, False, mesh)
            turns = [(ours, engine.train_step), (theirs, bare.step)]
            for seconds, turn in turns if step % 2 else turns[::-1]:
                if mesh.world_size > 1:
                    dist.barrier()
                seconds.append(seconds_of(turn, rows, totals.n_target_tokens, step))
    found = torch.tensor([statistics.median(seconds[n_warm_up:]) for seconds in (ours, theirs)])
    if mesh.world_size > 1:
        dist.all_reduce(found, dist.ReduceOp.MAX)
    return float(found[0]), float(found[1])


@contextlib.contextmanager
def clocked(steps_to_skip: int) -> Iterator[dict[str, float]]:
    """Adds up a run's time from the end of step `steps_to_skip`: `whole`, and `useful` inside what trains."""
    spent = {"useful": 0.0, "whole": 0.0}
    began = [0.0, 0.0]
    n_steps = [0]
    train_step, compute_agreement = Engine.train_step, agree

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            start = time.perf_counter()
            result = function(*arguments)
            spent["useful"] += time.perf_counter() - start
            return result

        return call

    def step(engine: Engine, *arguments: Any) -> Any:
        if not n_steps[0]:
            engine.deepspeed.forward = timed(engine.deepspeed.forward)
            for name in ("backward", "step"):
                plain = getattr(engine.deepspeed, name)
                setattr(engine.deepspeed, name, _with_options(timed, plain))
        result = train_step(engine, *arguments)
        n_steps[0] += 1
        if n_steps[0] == steps_to_skip:
            began[:] = [time.perf_counter(), spent["useful"]]
        spent["whole"] = time.perf_counter() - began[0]
        spent["measured"] = spent["useful"] - began[1]
        return result

    with (
        mock.patch.object(Engine, "train_step", step),
        mock.patch.object(trainer, "agree", timed(compute_agreement)),
    ):
        yield spent


def _with_options(timed: Callable[..., Any], plain: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *arguments, **options: timed(lambda: plain(*arguments, **options))()


def share_outside(config: Config) -> float:
    """Per cent of the trainer's time that is neither forward, backward, optimizer nor collective."""
    with clocked(steps_to_skip=10) as spent:
        trainer.train(config)
    return 100 * (1 - spent["measured"] / spent["whole"])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shards", type=Path, required=True)
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=["small"])
    parser.add_argument("--stages", nargs="+", type=int, default=[0, 1, 2, 3])
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ.get("RANK", "0"))
    length = target_len(read_pairs(options.shards)[0], ROW_LEN)
    rows = []
    for shape in options.shape:
        with tempfile.TemporaryDirectory() as folder:
            setting = Setting(options.shards, shape, ranks, 1, options.steps, 10, length, ())
            path = our_config(setting, Path(folder))
            for stage in options.stages:
                with open_mesh() as mesh:
                    ours, bare = compare(
                        load_config(path, [f"parallel.zero_stage={stage}"]), mesh, options.steps
                    )
                rows.append(
                    {"shape": shape, "ranks": ranks, "zero_stage": stage, "engine_s": ours, "bare_s": bare}
                )
                if not rank:
                    print(f"{shape}, {ranks} rank(s), ZeRO {stage}: {ours:.3f} s a step, bare loop {bare:.3f} s: "
                          f"{100 * (ours / bare - 1):+.1f} %", flush=True)  # fmt: skip
            outside = share_outside(load_config(path, ["parallel.zero_stage=2", "tracking.every=1000"]))
            rows.append({"shape": shape, "ranks": ranks, "outside_pct": outside})
            if not rank:
                print(f"{shape}, {ranks} rank(s): {outside:.2f} % of the trainer's time outside forward, backward, "
                      "optimizer and collectives", flush=True)  # fmt: skip
    if not rank:
        print(json.dumps(rows))


if __name__ == "__main__":
    main()
