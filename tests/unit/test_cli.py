"""Exit codes, sentences and options of the command line, without starting any work."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from dist_transformer import __version__, cli
from dist_transformer.cli import generate, prepare, run
from dist_transformer.config import load_config, preset_names
from dist_transformer.errors import ConfigError, DataError, UserError

Raise = Callable[[BaseException], None]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text("run: {dir: x}\ndata: {train: shards}\ntrain: {steps: 3}\n")
    return path


@pytest.fixture
def fail(monkeypatch: pytest.MonkeyPatch) -> Raise:
    """Makes `presets` raise."""

    def arrange(error: BaseException) -> None:
        def fail(_: Any) -> None:
            raise error

        monkeypatch.setattr(run, "_presets", fail)
        monkeypatch.delenv("RANK", raising=False)
        monkeypatch.delenv("SLURM_PROCID", raising=False)

    return arrange


@pytest.mark.parametrize(
    ("error", "exit_code"),
    [(UserError("it failed"), 1), (DataError("it failed"), 1), (ConfigError("it failed"), 2)],
)
def test_errors_are_sentences(
    error: Exception, exit_code: int, fail: Raise, capsys: pytest.CaptureFixture[str]
) -> None:
    fail(error)
    assert cli.main(["presets"]) == exit_code
    assert capsys.readouterr().err == "dist-transformer: it failed\n"


@pytest.mark.parametrize("arguments", [["--debug", "presets"], ["presets", "--debug"]])
def test_debug_shows_where(arguments: list[str], fail: Raise, capsys: pytest.CaptureFixture[str]) -> None:
    fail(DataError("it failed"))
    assert cli.main(arguments) == 1
    said = capsys.readouterr().err
    assert said.startswith("Traceback")
    assert "DataError: it failed" in said


@pytest.mark.parametrize("variable", ["RANK", "SLURM_PROCID"])
@pytest.mark.parametrize(
    ("rank", "on_every_rank", "said"),
    [
        ("0", True, "dist-transformer: it failed\n"),
        ("0", False, "dist-transformer: it failed\n"),
        ("3", True, ""),
        ("3", False, "dist-transformer: rank 3: it failed\n"),
    ],
)
def test_one_rank_speaks_for_all(
    variable: str, rank: str, on_every_rank: bool, said: str,
    fail: Raise, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    error = DataError("it failed")
    if on_every_rank:
        error.on_every_rank = True  # type: ignore[attr-defined]
    fail(error)
    monkeypatch.setenv(variable, rank)
    assert cli.main(["presets"]) == 1
    assert capsys.readouterr().err == said


def test_a_bug_keeps_its_traceback(fail: Raise) -> None:
    fail(ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):
        cli.main(["presets"])


def test_interrupted(fail: Raise, capsys: pytest.CaptureFixture[str]) -> None:
    fail(KeyboardInterrupt())
    assert cli.main(["presets"]) == 130
    assert capsys.readouterr().err == "dist-transformer: interrupted\n"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "COMMAND"),
        (["trian", "x.yaml"], "trian"),
        (["train"], "CONFIG.yaml"),
        (["prepare", "text", "a"], "--out"),
        (["prepare", "text", "a", "--out", "x", "--shards", "0"], "0 is not a positive number"),
        (["prepare", "text", "a", "--out", "x", "--held-out", "-1"], "-1 is negative"),
        (["generate", "run", "--beam-size", "many"], "many"),
        (["evaluate", "run", "--source", "a"], "--reference"),
    ],
)
def test_wrong_arguments(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert says in said
    assert re.search(r"\(see dist-transformer.* --help\)\n$", said)
    assert len(said.splitlines()) == 1


def test_held_out_files_go_together(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["prepare", "pairs", "--source", "a", "--target", "b", "--out", "x", "--eval-source", "c"]
    assert cli.main(arguments) == 2
    assert "--eval-source and --eval-target go together" in capsys.readouterr().err


def test_version_and_presets(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"dist-transformer {__version__}\n"
    assert cli.main(["presets"]) == 0
    assert capsys.readouterr().out.split() == preset_names()


def test_config_prints_what_a_run_would_use(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = ["train.steps=7", "model.preset=modern_small"]
    assert cli.main(["config", str(config), *overrides]) == 0
    printed = capsys.readouterr().out
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(printed)
    assert load_config(resolved) == load_config(config, overrides)
    assert set(yaml.safe_load(printed)) == set(type(load_config(config)).model_fields)


@pytest.mark.parametrize(
    ("field", "printed"),
    [("train.steps", "3"), ("run.dir", "x"), ("data.eval", "None"), ("tracking.wandb.mode", "auto")],
)
def test_one_field(field: str, printed: str, config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["config", str(config), "--field", field]) == 0
    assert capsys.readouterr().out == f"{printed}\n"


@pytest.mark.parametrize("field", ["train.stepz", "nothing", "train.steps.real", "train.model_dump"])
def test_no_such_field(field: str, config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["config", str(config), "--field", field]) == 2
    assert f"--field {field}: there is no such field" in capsys.readouterr().err


def test_every_bad_field_is_told(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["config", str(config), "train.steps=0", "optimizer.lr=-1"]) == 2
    said = capsys.readouterr().err
    assert "train.steps=0" in said
    assert "optimizer.lr=-1" in said
    assert "Traceback" not in said


def test_options_of_decoding() -> None:
    parser = cli.build_parser()
    options = parser.parse_args(["generate", "run", "--beam-size", "2", "--length-penalty", "0.6"])
    assert generate.decoding_of(options) == {"beam_size": 2, "length_penalty": 0.6}
    assert generate.decoding_of(parser.parse_args(["generate", "run"])) == {}


def test_options_of_preparation_are_the_functions_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every option of the command reaches a parameter of that name."""
    import inspect

    from dist_transformer.data.prepare import prepare_pairs, prepare_text

    parser = cli.build_parser()
    text = parser.parse_args(["prepare", "text", "a", "--out", "x"])
    pairs = parser.parse_args(["prepare", "pairs", "--source", "a", "--target", "b", "--out", "x"])
    for options, function in ((text, prepare_text), (pairs, prepare_pairs)):
        assert set(prepare._prepare_options(options)) <= set(inspect.signature(function).parameters)


def test_options_may_stand_between_arguments() -> None:
    """Overrides are the last arguments of several commands, and options are written anywhere."""
    parser = cli.build_parser()
    for line in (
        "data inspect c.yaml a.b=1 a.c=2 --rows 3",
        "data inspect --rows 3 c.yaml a.b=1 a.c=2",
        "data inspect c.yaml --rows 3 a.b=1 a.c=2",
        "data inspect c.yaml a.b=1 --rows=3 a.c=2",
    ):
        options = parser.parse_args(line.split())
        assert (options.what, options.overrides, options.rows) == ("c.yaml", ["a.b=1", "a.c=2"], 3)
    assert parser.parse_args(["data", "inspect", "c.yaml"]).overrides == []
