"""How long a save holds training up, and what it costs the steps meanwhile: synchronous against asynchronous.

    .venv/bin/python -m benchmarks.save_times [--d-model 512] [--saves 5]

One process on CPU, a model of 6 layers; every save begins after some steps, and steps go on until it is over.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

from dist_transformer.checkpoints.folder import TrainerState
from dist_transformer.config import build_config
from dist_transformer.data.token_ids import PAD_ID
from dist_transformer.engine.engine import Engine
from dist_transformer.engine.saving import Saver
from dist_transformer.parallel.mesh import Mesh
from tests.dist.harness import run_ranks
from tests.dist.test_gradients import Split, config_of, rows_of

N_IDLE = 4


def main() -> None:
    """Measure both, print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--d-model", type=int, default=512)
    parser.add_argument("--saves", type=int, default=5)
    parser.add_argument("--folder", help="a disk to write to (default: the temporary folder's)")
    options = parser.parse_args()
    print(
        "| saving | GiB | training waits (s) | until visible (s) | a step otherwise (s) | a step meanwhile (s) |"
    )
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for asynchronous in (False, True):
            [row] = run_ranks(
                1, measure, options.d_model, options.saves, asynchronous, folder, limit_s=3600.0
            )
            print(f"| {'asynchronous' if asynchronous else 'synchronous'} | {row} |")


def measure(mesh: Mesh, d_model: int, n_saves: int, asynchronous: bool, folder: str) -> str:
    """Medians over the saves."""
    tree = config_of("modern_small", Split(zero_stage=1), 8).model_dump(mode="json")
    tree["run"]["dir"] = str(Path(folder) / str(asynchronous))
    tree["model"] |= {
        "d_model": d_model, "d_ff": 4 * d_model, "n_heads": 8, "n_kv_heads": 8, "head_dim": d_model // 8,
        "n_encoder_layers": 3, "n_decoder_layers": 3,
    }  # fmt: skip
    tree["checkpoint"] |= {"keep": 1, "asynchronous": asynchronous}
    engine = Engine(build_config(tree), mesh)
    saver, batch = Saver(engine), rows_of(packed=False)
    n_targets = int((batch.decoder_target_tokens != PAD_ID).sum())
    idle, busy, outcomes, number = [], [], [], 0

    def step() -> float:
        nonlocal number
        number, start = number + 1, time.perf_counter()
        engine.train_step([batch], n_targets, number)
        return time.perf_counter() - start

    step()
    for _ in range(n_saves):
        idle += [step() for _ in range(N_IDLE)]
        ended = saver.begin(TrainerState(step=number))
        if not asynchronous:
            ended += saver.finish()
        while not ended:
            busy.append(step())
            ended = saver.poll()
        outcomes += ended
    assert all(outcome.error is None for outcome in outcomes)
    median = statistics.median
    return " | ".join(
        [
            f"{outcomes[0].n_bytes / 2**30:.2f}",
            f"{median(outcome.blocked_s for outcome in outcomes):.2f}",
            f"{median(outcome.total_s for outcome in outcomes):.2f}",
            f"{median(idle):.2f}",
            f"{median(busy):.2f}" if busy else "",
        ]
    )


if __name__ == "__main__":
    main()
