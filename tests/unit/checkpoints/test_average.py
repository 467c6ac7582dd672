"""`dist-transformer checkpoint average`, the best checkpoint, and how checkpoints are chosen."""

import functools
import json
from pathlib import Path

import pytest
import torch

from dist_transformer.checkpoints.folder import (
    TrainerState,
    best_checkpoint,
    damages,
    find_checkpoint_in,
    latest_checkpoint,
    list_checkpoints,
    read_trainer_state,
)
from dist_transformer.checkpoints.reader import load_weights
from dist_transformer.cli import main
from dist_transformer.config import build_config
from dist_transformer.engine.checkpoint import check_checkpoint
from dist_transformer.engine.engine import Engine
from dist_transformer.engine.saving import save_checkpoint
from dist_transformer.errors import CheckpointError
from dist_transformer.train.prepare_run import initial_weights
from tests.unit.engine.published import count_calls, fake_engine, names, write_step


def save(engine: Engine, step: int, best: int | None = None) -> Path:
    """A checkpoint; weights are the step's number, the average is three times it."""
    state = write_step(engine, step)
    if engine.average is not None:
        for value in engine.average.values:
            value.fill_(3.0 * step)
    state.best = None if best is None else {"metric": "eval/x/bleu", "value": 1.0, "step": best}
    return save_checkpoint(engine, state)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    engine = fake_engine(tmp_path / "run", ema_decay=0.9, keep=9)
    for step in (10, 20, 40):
        save(engine, step)
    (tmp_path / "run" / "config.yaml").write_text("the configuration")
    (tmp_path / "run" / "tokenizer.json").write_text("the tokenizer")
    return tmp_path / "run"


def test_the_mean_of_the_last(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", "average", str(run_dir), "--last", "2"]) == 0
    out = run_dir / "checkpoints" / "average-2-step-00000040"
    assert f"{out}: the mean of step-00000020, step-00000040" in capsys.readouterr().out
    weights = load_weights(out)
    assert torch.equal(weights["weight"], torch.full((10, 24), 30.0))
    assert torch.equal(weights["bias"], torch.full((10,), 31.0))
    assert list(damages(out, checksums=True)) == []
    assert (out / "config.yaml").read_text() == "the configuration"
    assert (out / "tokenizer.json").read_text() == "the tokenizer"
    assert read_trainer_state(out).step == 40
    # It is listed, and no run goes on from it by itself.
    assert latest_checkpoint(run_dir) == run_dir / "checkpoints" / "step-00000040"
    assert out not in list_checkpoints(run_dir)
    assert main(["checkpoint", "list", str(run_dir)]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith(out.name)
    engine = fake_engine(run_dir)
    with pytest.raises(CheckpointError, match=r"holds weights only: start a new run with train.init_from="):
        check_checkpoint(out, engine.config, engine.mesh)


def test_the_mean_of_given_steps_and_of_averages(run_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "elsewhere" / "mean"
    arguments = ["checkpoint", "average", str(run_dir), "--steps", "10,40", "--out", str(out)]
    assert main(arguments) == 0
    assert torch.equal(load_weights(out)["weight"], torch.full((10, 24), 25.0))
    description = json.loads((out / "trainer.json").read_text())
    assert description["average"] == {"of": ["step-00000010", "step-00000040"], "weights": "current"}
    assert main([*arguments, "--overwrite", "--weights", "ema"]) == 0
    assert torch.equal(load_weights(out)["weight"], torch.full((10, 24), 75.0))
    assert [path.name for path in out.parent.iterdir()] == ["mean"]
    with pytest.raises(CheckpointError, match="has no averaged weights"):
        load_weights(out, "ema")


def test_a_run_starts_from_a_mean(run_dir: Path) -> None:
    assert main(["checkpoint", "average", str(run_dir), "--last", "2"]) == 0
    tree = fake_engine(run_dir).config.model_dump(mode="json")
    tree["train"]["init_from"] = str(run_dir / "checkpoints" / "average-2-step-00000040")
    weights = initial_weights(build_config(tree))
    assert weights is not None
    assert torch.equal(weights["weight"], torch.full((10, 24), 30.0))


def test_means_are_exact(tmp_path: Path) -> None:
    """1/3 of thirds: the sum is not rounded on the way."""
    engine = fake_engine(tmp_path, keep=9)
    parameters = list(engine.model.parameters())
    kept = []
    for step in (1, 2, 3):
        state = write_step(engine, step)
        for parameter in parameters:
            torch.manual_seed(step)
            parameter.data.normal_().mul_(10.0 ** (2 * step))
        kept.append(parameters[0].detach().double())
        save_checkpoint(engine, state)
    assert main(["checkpoint", "average", str(tmp_path), "--last", "3"]) == 0
    found = load_weights(tmp_path / "checkpoints" / "average-3-step-00000003")["weight"]
    assert torch.equal(found, (sum(kept, torch.zeros((), dtype=torch.float64)) / 3).float())


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--last", "4"], "has 3 checkpoints, not 4"),
        (["--steps", "10,30"], "has no checkpoint step-00000030: there are step-00000010, step-00000020"),
        (["--last", "1", "--out", "OUT"], "is there already: give another --out, or --overwrite"),
        (["--last", "1", "--out", "OUT", "--overwrite"], "is there already"),
    ],
)
def test_what_cannot_be_averaged(
    run_dir: Path, tmp_path: Path, arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "OUT"
    out.mkdir()
    (out / "precious.txt").write_text("no checkpoint")
    filled = [str(out) if argument == "OUT" else argument for argument in arguments]
    assert main(["checkpoint", "average", str(run_dir), *filled]) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert says in line
    assert (out / "precious.txt").exists()
    assert not list(tmp_path.rglob("*.partial"))


def test_a_checkpoint_of_training_is_not_overwritten(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = run_dir / "checkpoints" / "step-00000010"
    before = (out / "trainer.json").read_bytes()
    arguments = ["checkpoint", "average", str(run_dir), "--last", "1", "--out", str(out), "--overwrite"]
    assert main(arguments) == 1
    assert "no mean of checkpoints: it is not overwritten" in capsys.readouterr().err
    assert (out / "trainer.json").read_bytes() == before


def test_a_damaged_checkpoint_leaves_nothing(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = run_dir / "checkpoints" / "step-00000020" / "rank-00000.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert main(["checkpoint", "average", str(run_dir), "--last", "3"]) == 1
    assert "is damaged" in capsys.readouterr().err
    assert not list((run_dir / "checkpoints").glob("average*"))


def test_the_average_is_saved_beside_the_weights(run_dir: Path, tmp_path: Path) -> None:
    checkpoint = run_dir / "checkpoints" / "step-00000020"
    assert torch.equal(load_weights(checkpoint)["weight"], torch.full((10, 24), 20.0))
    assert torch.equal(load_weights(checkpoint, "ema")["weight"], torch.full((10, 24), 60.0))
    out = tmp_path / "weights.pt"
    arguments = ["checkpoint", "convert", str(run_dir), "--format", "torch", "--out", str(out)]
    assert main([*arguments, "--checkpoint", "20", "--weights", "ema"]) == 0
    assert torch.equal(torch.load(out)["bias"], torch.full((10,), 60.0))


def test_there_is_no_average_without_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(fake_engine(tmp_path / "run"), 5)
    out = tmp_path / "x.safetensors"
    arguments = ["checkpoint", "convert", str(tmp_path / "run"), "--out", str(out), "--weights", "ema"]
    assert main(arguments) == 1
    assert "its run had no train.ema_decay" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_the_best_stays(tmp_path: Path) -> None:
    engine = fake_engine(tmp_path)
    for step, best in ((10, None), (20, 20), (30, 20), (40, 20), (50, 20)):
        save(engine, step, best)
    assert names(tmp_path) == ["best", "latest", "step-00000020", "step-00000040", "step-00000050"]
    assert best_checkpoint(tmp_path) == tmp_path / "checkpoints" / "step-00000020"
    save(engine, 60, 60)
    assert names(tmp_path) == ["best", "latest", "step-00000050", "step-00000060"]
    assert best_checkpoint(tmp_path) == latest_checkpoint(tmp_path)


def test_the_next_save_mends_a_pointer_that_a_crash_left_behind(tmp_path: Path) -> None:
    engine = fake_engine(tmp_path, keep=9)
    save(engine, 10, 10)
    save(engine, 20, 20)
    (tmp_path / "checkpoints" / "best").write_text("step-00000010\n")
    save(engine, 30, 20)
    assert best_checkpoint(tmp_path) == tmp_path / "checkpoints" / "step-00000020"


def test_a_crash_before_any_call_leaves_a_best_that_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """30 is the latest and the best, or neither, or the pointer is one save behind."""

    def prepare(folder: Path) -> Engine:
        engine = fake_engine(folder)
        for step in (10, 20):
            save(engine, step, 10)
        return engine

    n_calls = count_calls(monkeypatch, 0, functools.partial(save, prepare(tmp_path / "whole"), 30, 30))
    assert best_checkpoint(tmp_path / "whole") == latest_checkpoint(tmp_path / "whole")
    for crash_at in range(1, n_calls + 1):
        folder = tmp_path / f"crash-{crash_at}"
        engine = prepare(folder)
        count_calls(monkeypatch, crash_at, functools.partial(save, engine, 30, 30))
        latest, best = latest_checkpoint(folder), best_checkpoint(folder)
        assert latest is not None
        assert best is not None
        assert best.name in ("step-00000010", latest.name)
        check_checkpoint(best, engine.config, engine.mesh)
        state = read_trainer_state(latest)
        assert state.best is not None
        save(fake_engine(folder, keep=1), 40, state.best["step"])
        known = f"step-{state.best['step']:08d}"
        assert names(folder) == sorted(["best", "latest", known, "step-00000040"])
        assert best_checkpoint(folder) == folder / "checkpoints" / known


def test_choosing(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = run_dir / "checkpoints"
    assert find_checkpoint_in(run_dir).name == find_checkpoint_in(run_dir, "latest").name == "step-00000040"
    assert find_checkpoint_in(run_dir, "20") == find_checkpoint_in(run_dir, "step-00000020")
    assert find_checkpoint_in(run_dir, str(root / "step-00000020")) == root / "step-00000020"
    assert find_checkpoint_in(root / "step-00000010") == root / "step-00000010"
    for path, which, says in (
        (run_dir, "best", "no checkpoint is marked as the best"),
        (run_dir, "15", "has no checkpoint step-00000015: there are step-00000010"),
        (root / "step-00000010", "best", "is a checkpoint itself"),
        (run_dir, f"{run_dir}-other/checkpoints/step-00000010", "is not a checkpoint of"),
    ):
        with pytest.raises(CheckpointError, match=says):
            find_checkpoint_in(path, which)
    (root / "best").write_text("step-00000099\n")
    with pytest.raises(CheckpointError, match="best names 'step-00000099', which is not there"):
        find_checkpoint_in(run_dir, "best")
    (root / "best").write_text("step-00000010\n")
    assert main(["checkpoint", "list", str(run_dir)]) == 0
    assert "complete, best" in capsys.readouterr().out


def test_an_older_state_is_read(tmp_path: Path) -> None:
    """Checkpoints of before there were best ones and early ends."""
    path = save(fake_engine(tmp_path), 5)
    description = json.loads((path / "trainer.json").read_text())
    del description["state"]["best"], description["state"]["early_stopping"]
    (path / "trainer.json").write_text(json.dumps(description))
    assert read_trainer_state(path) == TrainerState(step=5, tokens_seen=50)
