"""Ranks never disagree on the number of steps or batches, whichever of them cannot read a shard."""

import contextlib
import random
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dist_transformer.config import Config, build_config
from dist_transformer.data.batch import Batch
from dist_transformer.data.prepare import prepare_pairs
from dist_transformer.data.shards import ShardSet
from dist_transformer.data.stream import TrainStream
from dist_transformer.errors import DataError, UserError
from dist_transformer.tracking import read_metrics
from dist_transformer.train import trainer
from dist_transformer.train.agreement import agree
from tests.dist.harness import Mesh, run_ranks

WORDS = ["alpha", "bravo", "charlie", "delta", "echo", "foxtrot", "golf", "hotel", "india", "juliet"]
STEPS = 4


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bad-shards")
    generator = random.Random(1)
    sources = [" ".join(generator.choices(WORDS, k=generator.randint(2, 9))) for _ in range(300)]
    (folder / "source.txt").write_text("".join(f"{line}\n" for line in sources))
    (folder / "target.txt").write_text("".join(f"{line.upper()[::-1]}\n" for line in sources))
    prepare_pairs(
        [(folder / "source.txt", folder / "target.txt")], folder / "shards",
        vocab_size=400, n_shards=4, workers=1, held_out=37,
    )  # fmt: skip
    return folder / "shards"


def config_of(shards: str, run_dir: str, policy: str) -> Config:
    return build_config(
        {
            "run": {"dir": run_dir, "seed": 4},
            "model": {
                "preset": "t5_v1_1_small", "d_model": 16, "d_ff": 16, "n_heads": 2, "head_dim": 8,
                "n_encoder_layers": 1, "n_decoder_layers": 1,
            },
            "data": {
                "train": shards, "eval": shards, "objective": "pairs", "workers": 0, "window": 16,
                "max_source_len": 24, "max_target_len": 48, "on_bad_shard": policy, "fingerprint": True,
            },
            "train": {"steps": STEPS, "global_batch_size": 8, "micro_batch_size": 2, "precision": "fp32"},
            "evaluate": {"every": 2, "batches": None},
            "tracking": {"every": 1, "wandb": {"mode": "disabled"}},
        }
    )  # fmt: skip


@contextlib.contextmanager
def unreadable(mesh: Mesh, split: str) -> Iterator[None]:
    """The last rank's disk fails for the shards of a split; and `train` takes the mesh that these ranks have."""
    plain = ShardSet.open

    def failing(shards: ShardSet, shard: int) -> Any:
        if mesh.rank == mesh.world_size - 1 and Path(shards.location(shard)).name.startswith(split):
            raise DataError(f"shard {shards.location(shard)} cannot be opened (Input/output error)")
        return plain(shards, shard)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "open_mesh", lambda tp_degree: contextlib.nullcontext(mesh))
        patch.setattr(ShardSet, "open", failing)
        yield


def run(mesh: Mesh, config: Config, split: str) -> str:
    """What the run ended with."""
    with unreadable(mesh, split):
        try:
            trainer.train(config)
        except UserError as error:
            assert error.on_every_rank
            return str(error)
    return ""


def on_two_ranks(mesh: Mesh, shards: str, folder: str) -> dict[str, str]:
    return {
        "train, error": run(mesh, config_of(shards, f"{folder}/train", "error"), "train"),
        "eval, error": run(mesh, config_of(shards, f"{folder}/eval", "error"), "eval"),
        "eval, skip": run(mesh, config_of(shards, f"{folder}/eval-skip", "skip"), "eval"),
        "missing, skip": run(mesh, config_of(f"{shards}-missing", f"{folder}/missing", "skip"), "none"),
    }


Found = tuple[list[dict[str, str]], Path]


@pytest.fixture(scope="module")
def found(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Found:
    """(each rank's results, the folder of run directories)."""
    folder = tmp_path_factory.mktemp("runs")
    missing = shards.with_name("shards-missing")
    shutil.copytree(shards, missing)
    (missing / "train-00001.tar").unlink()
    return run_ranks(2, on_two_ranks, str(shards), str(folder)), folder


@pytest.mark.parametrize("split", ["train", "eval"])
def test_a_shard_that_one_rank_cannot_read_ends_all_with_its_sentence(found: Found, split: str) -> None:
    (first, second), folder = found
    assert first[f"{split}, error"] == second[f"{split}, error"]
    assert f"/{split}-0000" in first[f"{split}, error"] and "Input/output error" in first[f"{split}, error"]
    rows = [row for row in read_metrics(folder / split) if row["event"] == "train"]
    assert len(rows) == (0 if split == "train" else 2)


def test_a_held_out_set_that_one_rank_cannot_read_is_left_out_by_all(found: Found) -> None:
    ranks, folder = found
    assert [rank["eval, skip"] for rank in ranks] == ["", ""]
    rows = read_metrics(folder / "eval-skip")
    assert [row["step"] for row in rows if row["event"] == "train"] == [1, 2, 3, 4]
    assert "eval" not in {row["event"] for row in rows}
    alerts = [row for row in rows if row["event"] == "alert"]
    assert [(row["step"], row["alert/kind"]) for row in alerts] == [(2, "data"), (4, "data")]
    assert "held-out set shards is not evaluated: shard " in alerts[0]["alert/text"]


def test_lost_samples_are_counted_and_told(found: Found) -> None:
    ranks, folder = found
    assert [rank["missing, skip"] for rank in ranks] == ["", ""]
    rows = read_metrics(folder / "missing")
    lost = [row["data/bad_samples"] for row in rows if row["event"] == "train"]
    assert len(lost) == STEPS and lost == sorted(lost) and lost[-1] > 0
    told = [row for row in rows if row["event"] == "alert"]
    assert told and all(row["alert/kind"] == "data" for row in told)
    assert "samples of bad shards are left out so far: shard " in told[0]["alert/text"]
    assert "train-00001.tar" in told[0]["alert/text"]
    assert [row["eval/shards_missing/loss"] > 0 for row in rows if row["event"] == "eval"] == [True, True]


def first_batches(config: Config) -> list[Batch]:
    stream = TrainStream(config.data, seed=4, dp_rank=0, dp_size=1, micro_batch_size=2)
    iterator = iter(stream)
    return [next(iterator) for _ in range(2)]


def sharing_rows(mesh: Mesh, shards: str) -> dict[str, Any]:
    """What two ranks that share each layer agree on, with the same rows and with different ones."""
    batches = first_batches(config_of(shards, "unused", "skip"))
    totals, stop, save = agree(batches, None, mesh.rank == 1, False, mesh)
    mine = batches if mesh.rank == 0 else [batches[0], replace(batches[1], n_pairs=batches[1].n_pairs + 1)]
    said = []
    for error, own in ((None, mine), (DataError("this one") if mesh.rank == 1 else None, batches)):
        try:
            agree(own, error, False, False, mesh)
        except UserError as problem:
            assert problem.on_every_rank
            said.append(str(problem))
    counts = [totals.n_pairs, totals.n_source_tokens, totals.fingerprint]
    wanted = [
        sum(batch.n_pairs for batch in batches),
        sum(batch.n_source_tokens for batch in batches),
        sum(batch.fingerprint for batch in batches),
    ]
    return {"counts": counts, "wanted": wanted, "stop": stop, "save": save, "said": said}


def test_ranks_that_share_rows_must_have_the_same(shards: Path) -> None:
    first, second = run_ranks(2, sharing_rows, str(shards), tp_degree=2)
    assert first == second
    assert first["counts"] == first["wanted"]
    assert first["stop"] is True and first["save"] is False
    assert "read different samples" in first["said"][0]
    assert first["said"][1] == "this one"
