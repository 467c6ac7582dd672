"""`data verify`, `data index`, and training on what they say, through the command line."""

import io
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from dist_transformer.tracking.metrics import read_metrics
from tests.e2e.conftest import command


def test_verify(pair_shards: Path, tmp_path: Path) -> None:
    done = command("data", "verify", pair_shards, "--workers", 2)
    assert done.returncode == 0, done.stderr
    assert "train" in done.stdout and "eval" in done.stdout

    folder = tmp_path / "copy"
    shutil.copytree(pair_shards, folder)
    first, second = sorted(folder.glob("train-*.tar"))[:2]
    first.write_bytes(first.read_bytes()[:-20000])
    second.unlink()
    done = command("data", "verify", folder, "--workers", 1)
    assert done.returncode == 1
    lines = [line for line in done.stdout.splitlines() if line.startswith("shard ")]
    assert len(lines) == 2 and f"{first}: it has" in lines[0] and f"{second} cannot be opened" in lines[1]
    assert done.stderr.splitlines()[-1] == "dist-transformer: 2 of 5 shards are damaged"
    assert "Traceback" not in done.stderr


@pytest.fixture
def tars(pair_files: Path, tmp_path: Path) -> Path:
    """Four tars as others write them: two texts and something else with each key."""
    sides = [(pair_files / f"{side}.txt").read_text().splitlines() for side in ("source", "target")]
    (tmp_path / "tars").mkdir()
    for shard in range(4):
        with tarfile.open(tmp_path / "tars" / f"part-{shard}.tar", "w") as tar:
            for number in range(shard, 600, 4):
                for name, content in (
                    ("jpg", "picture"),
                    ("en.txt", sides[0][number]),
                    ("xx.txt", sides[1][number]),
                ):
                    info = tarfile.TarInfo(f"images/{number}.{name}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content.encode()))
    return tmp_path / "tars"


def test_the_tars_of_others_train_even_if_one_is_damaged(
    tars: Path, pair_shards: Path, tmp_path: Path, write_config: Callable[..., Path]
) -> None:
    out = tmp_path / "index"
    done = command(
        "data", "index", f"{tars}/part-{{0..3}}.tar", "--source-field", "en.txt", "--target-field", "xx.txt",
        "--tokenizer", pair_shards / "tokenizer.json", "--out", out, "--workers", 1,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "600 samples in 4 tars" in done.stdout
    tar = tars / "part-2.tar"
    tar.write_bytes(tar.read_bytes()[: tar.stat().st_size // 2])

    config = write_config(out, train={"steps": 20}, data={"eval": str(pair_shards)})
    done = command("train", config, "data.on_bad_shard=skip")
    assert done.returncode == 0, done.stderr
    last = [row for row in read_metrics(tmp_path / "run") if row["event"] == "train"][-1]
    assert last["step"] == 20 and int(str(last["data/bad_samples"])) > 0


def test_arguments_that_do_not_fit(tmp_path: Path) -> None:
    for fields in ((), ("--field", "txt", "--source-field", "a"), ("--source-field", "a")):
        done = command("data", "index", "x.tar", *fields, "--tokenizer", "t.json", "--out", tmp_path / "out")
        assert done.returncode == 2 and "give --field for plain text, or --source-field and" in done.stderr
