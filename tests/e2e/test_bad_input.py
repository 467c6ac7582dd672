"""Bad input is one sentence that names the thing and the fix, before training, and nothing is damaged."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.conftest import command, launch

WriteConfig = Callable[..., Path]


def refused(*arguments: str | Path, exit_code: int, says: list[str]) -> str:
    """Run a command that must fail so; returns what it said."""
    done = command(*arguments)
    assert done.returncode == exit_code, (done.returncode, done.stdout, done.stderr)
    assert "Traceback" not in done.stderr
    for words in says:
        assert words in done.stderr, f"{words!r} is not in {done.stderr!r}"
    assert "step 1/" not in done.stdout
    return done.stderr


def contents(folder: Path) -> dict[str, str]:
    return {
        str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.rglob("*")) if p.is_file()
    }


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("train.stesp=5", ["train.stesp: unknown key", "did you mean steps?"]),
        ("trian.steps=5", ["trian: unknown key", "did you mean train?"]),
        ("train.steps=0", ["train.steps=0", "greater than 0"]),
        ("train.precision=fp16", ["train.precision='fp16'", "'fp32' or 'bf16'"]),
        ("model.preset=t5_v1_1_smal", ["model.preset=t5_v1_1_smal", "did you mean t5_v1_1_small"]),
        ("model.n_heads=5", ["n_heads=5"]),
        ("train.micro_batch_size=3", ["micro_batch_size=3 does not divide train.global_batch_size=8"]),
        ("parallel.offload=all", ["offload=all needs zero_stage=3"]),
        ("deepspeed.wandb.enabled=true", ["deepspeed.wandb", "use tracking.wandb"]),
        ("train.steps", ["'train.steps' is not an override"]),
    ],
)
def test_configuration(override: str, says: list[str], pair_shards: Path, write_config: WriteConfig) -> None:
    config = write_config(pair_shards, model={"head_dim": None})
    refused("train", config, override, exit_code=2, says=says)


def test_configuration_file(tmp_path: Path) -> None:
    refused("train", tmp_path / "none.yaml", exit_code=2, says=["none.yaml: no such configuration file"])
    broken = tmp_path / "broken.yaml"
    broken.write_text("run: {dir: x\ndata: [")
    refused("train", broken, exit_code=2, says=["broken.yaml, line", "not valid YAML"])


def test_shards(tmp_path: Path, pair_shards: Path, write_config: WriteConfig) -> None:
    refused(
        "train",
        write_config(tmp_path / "none"),
        exit_code=1,
        says=[str(tmp_path / "none"), "dist-transformer prepare"],
    )
    empty = tmp_path / "empty"
    empty.mkdir()
    refused("train", write_config(empty), exit_code=1, says=[str(empty), "dist-transformer prepare"])
    refused(
        "train",
        write_config(pair_shards, objective="span_corruption"),
        exit_code=1,
        says=["span_corruption needs text"],
    )
    refused("train", write_config(pair_shards), "data.workers=3", exit_code=1, says=["3 lanes", "4 shards"])

    short = tmp_path / "short"
    shutil.copytree(pair_shards, short)
    shard = short / "train-00002.tar"
    shard.write_bytes(shard.read_bytes()[:-512])
    refused("train", write_config(short), exit_code=1, says=["train-00002.tar"])
    shard.unlink()
    refused("train", write_config(short), exit_code=1, says=["train-00002.tar"])


def test_tokenizer_and_vocabulary(
    tmp_path: Path, pair_shards: Path, text_shards: Path, write_config: WriteConfig
) -> None:
    mixed = tmp_path / "mixed"
    shutil.copytree(pair_shards, mixed)
    shutil.copy(text_shards / "tokenizer.json", mixed / "tokenizer.json")
    refused("train", write_config(mixed), exit_code=1, says=["tokenizer does not match the shards"])
    refused(
        "train", write_config(pair_shards), "model.vocab_size=64", exit_code=2,
        says=["model.vocab_size=64 is smaller than the tokenizer's"],
    )  # fmt: skip


def test_preparation(tmp_path: Path, pair_files: Path) -> None:
    source, target = pair_files / "source.txt", pair_files / "target.txt"
    short = tmp_path / "short.txt"
    short.write_text("".join(target.read_text().splitlines(keepends=True)[:-7]))
    out = tmp_path / "out"
    refused(
        "prepare",
        "pairs",
        "--source",
        source,
        "--target",
        short,
        "--out",
        out,
        exit_code=1,
        says=["600", "593", "short.txt"],
    )
    assert not out.exists()

    latin = tmp_path / "latin.txt"
    latin.write_bytes("eins\nzwei\nüber\n".encode("latin-1"))
    refused("prepare", "text", latin, "--out", out, exit_code=1, says=["latin.txt", "line 3", "UTF-8"])
    refused("prepare", "text", tmp_path / "none.txt", "--out", out, exit_code=1, says=["none.txt"])
    refused("prepare", "text", "--out", out, exit_code=2, says=["FILE"])


def test_a_finished_folder_is_not_overwritten(pair_files: Path, pair_shards: Path) -> None:
    before = contents(pair_shards)
    refused(
        "prepare",
        "pairs", "--source", pair_files / "source.txt", "--target", pair_files / "target.txt", "--out", pair_shards,
        exit_code=1, says=["--overwrite"],
    )  # fmt: skip
    assert contents(pair_shards) == before


def test_checkpoint_of_another_model_or_damaged(
    tmp_path: Path, pair_shards: Path, write_config: WriteConfig
) -> None:
    config = write_config(pair_shards, train={"steps": 2})
    assert command("train", config).returncode == 0
    run_dir = tmp_path / "run"
    before = contents(run_dir / "checkpoints")
    refused(
        "train", config, "model.d_ff=96", "train.steps=4", exit_code=1,
        says=["step-00000002 is a checkpoint of another model", "model.d_ff is 64 there and 96", "run.dir"],
    )  # fmt: skip
    assert contents(run_dir / "checkpoints") == before
    files = json.loads((run_dir / "checkpoints" / "step-00000002" / "files.json").read_text())
    largest = run_dir / "checkpoints" / "step-00000002" / max(files, key=lambda name: files[name]["size"])
    largest.write_bytes(largest.read_bytes()[:-100])
    refused("train", config, "train.steps=4", exit_code=1, says=[largest.name, "the checkpoint is damaged"])
    refused("generate", run_dir, exit_code=1, says=[largest.name, "the checkpoint is damaged"])
    refused("generate", tmp_path / "nothing", exit_code=1, says=["nothing: no run there"])
    refused("report", tmp_path / "nothing", exit_code=1, says=["nothing"])


def test_on_several_ranks_it_is_said_once(
    tmp_path: Path, pair_shards: Path, write_config: WriteConfig
) -> None:
    """The configuration is read before any rank starts; what only ranks find is printed by one of them."""
    config = write_config(pair_shards)
    for override, sentence, exit_code in (
        ("train.stesp=5", "unknown key: did you mean steps?", 2),
        ("data.workers=3", "2 ranks x 3 workers need a multiple of 6 lanes", 1),
    ):
        done = launch(config, "--nproc", 2, override)
        assert done.returncode == exit_code, done.stdout + done.stderr
        assert (done.stdout + done.stderr).count(sentence) == 1
        assert "Traceback" not in done.stdout + done.stderr
