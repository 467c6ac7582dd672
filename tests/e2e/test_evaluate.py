"""A run that is scored while it trains, keeps its best checkpoint, averages, stops early; and what is done with it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from dist_transformer.checkpoints.folder import best_checkpoint, latest_checkpoint, list_checkpoints
from dist_transformer.cli import main
from dist_transformer.tracking import read_metrics
from dist_transformer.tracking.exits import decide_restart, read_exits
from tests.e2e.conftest import command, launch

WriteConfig = Callable[..., Path]
METRICS = [
    "bleu", "chrf", "exact_match", "rouge_l", "wer", "cer", "per", "token_accuracy", "sequence_accuracy",
]  # fmt: skip
N_SOURCES = 6


@pytest.fixture(scope="module")
def several(pair_files: Path) -> tuple[Path, Path]:
    """Each source three times, with three right targets."""
    folder = pair_files / "several"
    folder.mkdir()
    sources = (pair_files / "source.txt").read_text().splitlines()[:N_SOURCES]
    targets = (pair_files / "target.txt").read_text().splitlines()
    (folder / "source.txt").write_text("".join(f"{line}\n" * 3 for line in sources))
    right = [f"{targets[i]}\n{targets[i]} X\n{targets[i + 9]}\n" for i in range(N_SOURCES)]
    (folder / "target.txt").write_text("".join(right))
    return folder / "source.txt", folder / "target.txt"


@pytest.fixture(scope="module")
def run_dir(pair_files: Path, several: tuple[Path, Path], module_config: WriteConfig) -> Path:
    """Ten steps on two ranks, then as many as it takes on one.

    The loss falls, and larger is called better: the first evaluation is the best.
    """
    shards = pair_files / "held"
    done = command(
        "prepare", "pairs", "--source", pair_files / "source.txt", "--target", pair_files / "target.txt",
        "--eval-source", several[0], "--eval-target", several[1], "--vocab-size", 420, "--shards", 4, "--out", shards,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    early = {"metric": "eval/held/loss", "mode": "max", "patience": 3}
    config = module_config(
        shards,
        train={"ema_decay": 0.9, "early_stopping": early},
        checkpoint={"every": 10, "keep": 1, "best_metric": "eval/held/loss", "best_mode": "max"},
        evaluate={
            "every": 5, "metrics": METRICS, "sentences": 4, "samples": 2, "group_sources": True, "weights": "ema",
            "lowercase": True,
        },
        generate={"beam_size": 1, "max_len": 20},
    )  # fmt: skip
    for start in (
        launch(config, "--nproc", 2, "train.steps=10"),
        command("train", config, "train.steps=40", "parallel.zero_stage=3"),
    ):
        assert start.returncode == 0, start.stdout + start.stderr
    said = start.stdout + start.stderr
    assert "done: stopped early after step 20: eval/held/loss was not better than" in said
    return config.parent / "run"


def test_every_metric_is_in_the_rows_with_its_signature(run_dir: Path) -> None:
    rows = [row for row in read_metrics(run_dir) if row["event"] == "eval"]
    assert [row["step"] for row in rows] == [5, 10, 15, 20]
    for row in rows:
        values = [row[f"eval/held/{name}"] for name in ("loss", "accuracy", *METRICS)]
        assert all(isinstance(value, float) for value in values)
        assert row["eval/held/token_accuracy"] == pytest.approx(100 * row["eval/held/accuracy"])
        assert row["eval/held/bleu_signature"].startswith(
            "nrefs:3|case:lc|eff:no|tok:13a|smooth:exp|version:"
        )
        assert row["eval/held/per_signature"].startswith("nrefs:3|case:lc|unit:phoneme|ref:closest|")
    text = (run_dir / "samples" / "step-00000020.txt").read_text()
    # Two samples are two sources, though each stands three times in the set.
    assert len({line for line in text.splitlines() if line.startswith("source:")}) == 2


def test_the_best_stays_and_the_count_went_on_after_the_first_ten_steps(run_dir: Path) -> None:
    assert [path.name for path in list_checkpoints(run_dir)] == ["step-00000005", "step-00000020"]
    assert best_checkpoint(run_dir) == run_dir / "checkpoints" / "step-00000005"
    assert latest_checkpoint(run_dir) == run_dir / "checkpoints" / "step-00000020"
    assert [(end.reason, end.step) for end in read_exits(run_dir)][:2] == [
        ("done", 10),
        ("early_stopped", 20),
    ]
    assert not decide_restart(run_dir, 3).restart


def test_the_command_scores_what_training_scored(
    run_dir: Path, several: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """All held-out pairs, the same weights: the loss is the same; and of both kinds of weights."""
    row = [row for row in read_metrics(run_dir) if row["event"] == "eval"][-1]
    arguments = ["evaluate", str(run_dir), "--source", str(several[0]), "--reference", str(several[1])]
    assert main(arguments) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["sentences"] == N_SOURCES
    assert found["references"] == 3 * N_SOURCES
    assert found["checkpoint"] == "step-00000020"
    assert found["loss"] == pytest.approx(row["eval/held/loss"], abs=1e-4)
    assert found["token_accuracy"] == pytest.approx(row["eval/held/token_accuracy"], abs=0.01)
    assert set(METRICS) <= found.keys()
    assert found["signature"] == found["signatures"]["bleu"] == row["eval/held/bleu_signature"]
    assert main([*arguments, "--weights", "current", "--metrics", "per", "--no-group-sources"]) == 0
    current = json.loads(capsys.readouterr().out)
    assert current["sentences"] == 3 * N_SOURCES
    assert "bleu" not in current
    assert current["signatures"]["per"].startswith("nrefs:1|case:lc|unit:phoneme")
    assert abs(current["loss"] - found["loss"]) > 0.01
    # With everything ignored, nothing differs.
    assert main([*arguments, "--metrics", "exact_match", "--ignore", r"\S"]) == 0
    assert json.loads(capsys.readouterr().out)["exact_match"] == 100
    with pytest.raises(SystemExit, match="2"):
        main([*arguments, "--ignore", "[0-9"])
    assert "argument --ignore: '[0-9' is no regular expression (unterminated" in capsys.readouterr().err


def test_several_reference_files_and_a_table(
    run_dir: Path, pair_files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = {name: (pair_files / f"{name}.txt").read_text().splitlines() for name in ("source", "target")}
    for name, chosen in (
        ("s", lines["source"][:5]),
        ("a", lines["target"][:5]),
        ("b", lines["target"][5:10]),
    ):
        (tmp_path / name).write_text("".join(f"{line}\n" for line in chosen))
    assert main([
        "evaluate", str(run_dir), "--source", str(tmp_path / "s"), "--reference", str(tmp_path / "a"),
        str(tmp_path / "b"), "--checkpoint", "best", "--metrics", "bleu,rouge_l", "--tokenize", "none",
        "--no-lowercase", "--out", str(tmp_path / "x.json"), "--output", str(tmp_path / "decoded"),
    ]) == 0  # fmt: skip
    table = capsys.readouterr().out
    found = json.loads((tmp_path / "x.json").read_text())
    assert found["checkpoint"] == "step-00000005"
    assert found["references"] == 10
    assert found["signature"].startswith("nrefs:2|case:mixed|eff:no|tok:none|")
    assert [line.split()[0] for line in table.splitlines()] == ["bleu", "rouge_l", "loss", "5"]
    assert len((tmp_path / "decoded").read_text().splitlines()) == 5


def test_averaging_while_reading_and_beforehand_is_the_same(
    run_dir: Path, several: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = ["--source", str(several[0]), "--reference", str(several[1])]
    assert main(["evaluate", str(run_dir), *files, "--average", "2", "--weights", "current"]) == 0
    at_once = json.loads(capsys.readouterr().out)
    out = tmp_path / "mean"
    assert main(["checkpoint", "average", str(run_dir), "--last", "2", "--out", str(out)]) == 0
    capsys.readouterr()
    assert main(["evaluate", str(out), *files]) == 0
    beforehand = json.loads(capsys.readouterr().out)
    assert at_once["averaged"] == ["step-00000005", "step-00000020"] and at_once["weights"] == "current"
    which: dict[str, object] = {"checkpoint": "", "averaged": []}
    assert beforehand | which == at_once | which
    generated = tmp_path / "generated"
    assert main(["generate", str(out), "--input", str(several[0]), "--output", str(generated)]) == 0
    assert len(generated.read_text().splitlines()) == 3 * N_SOURCES


def test_an_ensemble(
    run_dir: Path, several: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run's two checkpoints decode together; with itself, a model is itself; other tokenizers are refused."""
    files = ["--source", str(several[0]), "--reference", str(several[1])]
    found: dict[str, dict[str, object]] = {}
    best = run_dir / "checkpoints" / "step-00000005"
    for name, ensemble in (("alone", []), ("itself", [run_dir]), ("both", [best])):
        options = ["--ensemble", *map(str, ensemble)] if ensemble else []
        assert main(["evaluate", str(run_dir), *files, *options]) == 0
        found[name] = json.loads(capsys.readouterr().out)
        assert found[name]["ensemble"] == [
            str(run_dir / "checkpoints" / "step-00000020") if path == run_dir else str(path)
            for path in ensemble
        ]
    assert found["itself"] | {"ensemble": []} == found["alone"]
    assert found["both"]["loss"] != found["alone"]["loss"]
    out = tmp_path / "decoded"
    command_line = [
        "generate",
        str(run_dir),
        "--ensemble",
        str(best),
        "--nproc",
        "2",
        "--input",
        str(several[0]),
    ]
    assert main([*command_line, "--output", str(out)]) == 0
    assert len(out.read_text().splitlines()) == 3 * N_SOURCES
    other = tmp_path / "other"
    shutil.copytree(run_dir, other, ignore=shutil.ignore_patterns("logs", "wandb"))
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    (other / "tokenizer.json").write_text(json.dumps(tokenizer, indent=7))
    assert main(["evaluate", str(run_dir), *files, "--ensemble", str(other)]) == 1
    assert "only models of one vocabulary decode together" in capsys.readouterr().err


def test_the_same_command_is_done_at_once(run_dir: Path) -> None:
    config = run_dir / "config.yaml"
    n_rows = len(read_metrics(run_dir))
    again = command("train", config)
    assert again.returncode == 0, again.stderr
    assert "done: stopped early after step 20" in again.stdout + again.stderr
    assert [row for row in read_metrics(run_dir)[n_rows:] if row["event"] in ("train", "checkpoint")] == []
    assert read_exits(run_dir)[-1].reason == "early_stopped"


def test_bad_input(
    run_dir: Path,
    pair_files: Path,
    several: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source, target = (str(path) for path in several)
    good = ["evaluate", str(run_dir), "--source", source, "--reference", target]
    assert main([*good, str(pair_files / "target.txt")]) == 1
    assert capsys.readouterr().err.endswith("target.txt 600: they must be parallel\n")
    for options, says in (
        (["--output", source], "is a file that is read"),
        (["--output", str(tmp_path / "no" / "x")], "cannot be written"),
        (["--out", str(tmp_path / "no" / "x")], "cannot be written"),
    ):
        assert main([*good, *options]) == 1
        assert says in capsys.readouterr().err
    assert main([*good, "--weights", "ema", "--checkpoint", "7"]) == 1
    assert (
        "has no checkpoint step-00000007: there are step-00000005, step-00000020" in capsys.readouterr().err
    )
    with pytest.raises(SystemExit) as wrong:
        main([*good, "--metrics", "bleu,meteor"])
    assert wrong.value.code == 2
    assert "no metric meteor: there are bleu, chrf" in capsys.readouterr().err
