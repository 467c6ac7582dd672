"""Defaults, preset, YAML, overrides, in this order; every problem with its path, its value and what would be valid."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from dist_transformer.config import (
    Config,
    build_config,
    dump_config,
    load_config,
    preset_names,
    shipped_files,
)
from dist_transformer.errors import ConfigError

MINIMAL: dict[str, Any] = {"run": {"dir": "x"}, "data": {"train": "shards"}, "train": {"steps": 10}}
RECIPES = sorted(shipped_files("configs").glob("*.yaml"))


@pytest.fixture
def minimal(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    return path


def problems_of(tree: dict[str, Any]) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        build_config(tree)
    assert caught.value.exit_code == 2
    return str(caught.value).splitlines()


def test_all_problems_at_once_with_path_value_and_fix() -> None:
    found = problems_of(
        {
            "run": {"seed": -1},
            "model": {"n_heads": 6, "d_model": 512, "n_kv_heads": 4},
            "data": {"train": "x", "noise_density": 1.5, "objective": "spans"},
            "train": {"steps": 0, "mico_batch_size": 4},
            "parallel": {"zero_stage": 4},
            "optimizer": {"betas": [0.9, 1.0]},
        }
    )
    expected = [
        ["run.dir: required and not given"],
        ["run.seed=-1: ", "greater than or equal to 0"],
        [
            "model: ",
            "n_heads=6 does not divide d_model=512: try 4 or 8",
            "n_kv_heads=4",
            "try 1 or 2 or 3 or 6",
        ],
        ["data.noise_density=1.5: ", "less than 1"],
        ["data.objective='spans': ", "'span_corruption' or 'pairs'"],
        ["train.steps=0: ", "greater than 0"],
        ["train.mico_batch_size: unknown key: did you mean micro_batch_size?"],
        ["parallel.zero_stage=4: ", "0, 1, 2 or 3"],
        ["optimizer: betas=[0.9, 1.0] must each be at least 0 and below 1"],
    ]
    assert len(found) == len(expected), found
    for words in expected:
        assert any(all(word in line for word in words) for line in found), (words, found)
    assert all(line.startswith("configuration: ") for line in found)


def test_problems_between_sections_are_reported_together() -> None:
    [found] = problems_of(
        {
            **MINIMAL,
            "model": {"positions": "learned", "max_positions": 100},
            "train": {"steps": 1, "global_batch_size": 10, "micro_batch_size": 4},
            "deepspeed": {"fp16": {"enabled": True}},
        }
    )
    assert "train.micro_batch_size=4 does not divide train.global_batch_size=10" in found
    assert "model.max_positions=100 is shorter than a row of 512 tokens: set model.max_positions=512" in found
    assert "deepspeed.fp16 is ours to set: use train.precision" in found


@pytest.mark.parametrize(
    ("tree", "path", "meant"),
    [
        ({"trian": {}}, "trian", "train"),
        ({"train": {"steps": 1, "presision": "fp32"}}, "train.presision", "precision"),
        ({"tracking": {"wandb": {"projct": "x"}}}, "tracking.wandb.projct", "project"),
        ({"model": {"encoder": {"d_modl": 8}}}, "model.encoder.d_modl", "d_model"),
    ],
)
def test_unknown_keys_are_answered_at_every_depth(tree: dict[str, Any], path: str, meant: str) -> None:
    assert f"configuration: {path}: unknown key: did you mean {meant}?" in problems_of({**MINIMAL, **tree})


def test_a_key_like_no_other_is_answered_with_all_that_are_known() -> None:
    [found] = problems_of({**MINIMAL, "recompute": {"zzz": 1}})
    assert found == "configuration: recompute.zzz: unknown key: known here: encoder, decoder"


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("train.steps=7", ("train", "steps"), 7),
        ("train.steps=1e3", ("train", "steps"), 1000),
        ("optimizer.lr=1e-4", ("optimizer", "lr"), 1e-4),
        ("optimizer.lr=3E-5", ("optimizer", "lr"), 3e-5),
        ("optimizer.betas=[0.8, 0.99]", ("optimizer", "betas"), (0.8, 0.99)),
        ("data.packing=false", ("data", "packing"), False),
        ("data.eval=held=out", ("data", "eval"), "held=out"),
        ("data.eval=null", ("data", "eval"), None),
        ("data.eval=", ("data", "eval"), None),
        ("tracking.wandb.name=e2e", ("tracking", "wandb", "name"), "e2e"),
        ("tracking.wandb.tags=[a, b]", ("tracking", "wandb", "tags"), ("a", "b")),
        ("tracking.wandb={mode: offline}", ("tracking", "wandb", "mode"), "offline"),
        ("model.encoder.d_ff=96", ("model", "encoder", "d_ff"), 96),
        ("deepspeed.a.b=5e7", ("deepspeed",), {"a": {"b": 5e7}}),
    ],
)  # fmt: skip
def test_overrides(minimal: Path, override: str, path: tuple[str, ...], value: object) -> None:
    found: Any = load_config(minimal, [override])
    for name in path:
        found = getattr(found, name)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("train.steps", "'train.steps' is not an override: write section.key=value"),
        ("=3", "'=3' is not an override"),
        ("train..steps=3", "'train..steps=3' is not an override"),
        (".train=3", "'.train=3' is not an override"),
        ("run.dir.name=3", "'run.dir.name=3': dir is a value, not a section"),
        ("train.steps=[1", "'train.steps=[1': the value is not valid YAML"),
        ("train.steps=many", "train.steps='many': "),
        ("steps=4", "steps: unknown key"),
        ("recompute=4", "recompute=4: should be a section with the fields encoder, decoder"),
    ],
)
def test_bad_overrides(minimal: Path, override: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(minimal, [override])
    assert says in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_every_bad_override_is_reported(minimal: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(minimal, ["train.steps", "run.dir.name=3", "optimizer.lr=-1", "data.wokers=1"])
    words = ("'train.steps'", "'run.dir.name=3'", "optimizer.lr=-1", "did you mean workers?")
    lines = str(caught.value).splitlines()
    assert len(lines) == 4
    assert all(any(word in line for line in lines) for word in words)


def test_later_overrides_win_and_the_file_stays(minimal: Path) -> None:
    before = minimal.read_bytes()
    assert load_config(minimal, ["train.steps=3", "train.steps=4"]).train.steps == 4
    assert minimal.read_bytes() == before


def test_preset_first_then_single_fields() -> None:
    preset = build_config({**MINIMAL, "model": {"preset": "t5_v1_1_small"}}).model
    changed = build_config({**MINIMAL, "model": {"dropout": 0.3, "preset": "t5_v1_1_small"}}).model
    assert preset.ffn == "geglu_tanh"
    assert preset.d_ff == 1024
    assert changed == preset.model_copy(update={"dropout": 0.3})


def test_an_unknown_preset_does_not_hide_other_problems() -> None:
    found = problems_of({**MINIMAL, "train": {"steps": -5}, "model": {"preset": "t5_v1_1_bas"}})
    assert len(found) == 2
    assert any(
        "model.preset=t5_v1_1_bas is not a preset: did you mean t5_v1_1_base" in line for line in found
    )
    assert any("train.steps=-5" in line for line in found)


def test_a_preset_that_is_no_name() -> None:
    [found] = problems_of({**MINIMAL, "model": {"preset": 7}})
    assert "model.preset=7 is not a preset: there are modern_base" in found


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipes_survive_dump_and_load(recipe: Path, tmp_path: Path) -> None:
    config = load_config(recipe)
    written = tmp_path / "config.yaml"
    written.write_text(dump_config(config))
    assert load_config(written) == config


@pytest.mark.parametrize("preset", preset_names())
def test_presets_survive_dump_and_load(preset: str, tmp_path: Path) -> None:
    config = build_config({**MINIMAL, "model": {"preset": preset, "decoder": {"dropout": 0.25}}})
    written = tmp_path / "config.yaml"
    written.write_text(dump_config(config))
    assert load_config(written) == config


def test_a_resolved_configuration_does_not_change_with_its_preset() -> None:
    """A run's `config.yaml` names the preset and holds every field: the fields decide."""
    tree = yaml.safe_load(
        dump_config(build_config({**MINIMAL, "model": {"preset": "modern_small", "d_ff": 64}}))
    )
    assert build_config(tree).model.d_ff == 64
    assert set(tree["model"]) == set(type(build_config(tree).model).model_fields)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"run: {dir: x\ndata: [", "line 2: not valid YAML"),
        (b"- a\n- b\n", "should hold sections such as `run:` and `data:`, not list"),
        (b"", "should hold sections such as `run:` and `data:`, not NoneType"),
        (b"run: {dir: \xff}", "cannot be read"),
    ],
)
def test_files_that_are_no_configuration(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"bad\.yaml") as caught:
        load_config(path)
    assert says in str(caught.value)
    with pytest.raises(ConfigError, match=r"none\.yaml: no such configuration file"):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path)


def test_a_section_left_empty_is_its_defaults(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("run: {dir: x}\ndata: {train: s}\ntrain: {steps: 1}\noptimizer:\nmodel:\n")
    config = load_config(path, ["optimizer.lr=0.5"])
    assert config.optimizer.lr == 0.5
    assert config.model == build_config(MINIMAL).model


def test_configuration_is_frozen() -> None:
    config = build_config(MINIMAL)
    with pytest.raises(ValueError, match="frozen"):
        config.train.steps = 3  # type: ignore[misc]


def test_configuration_imports_no_torch() -> None:
    code = (
        "import sys; from dist_transformer.config import load_config; load_config(sys.argv[1]);"
        "print(sorted({'torch', 'numpy', 'deepspeed', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(RECIPES[0])], capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"


def test_every_field_has_a_docstring() -> None:
    def check(model: Any, path: str) -> None:
        for name, field in model.model_fields.items():
            nested = field.annotation
            if isinstance(nested, type) and hasattr(nested, "model_fields"):
                assert nested.__doc__, f"{path}{name}"
                check(nested, f"{path}{name}.")
            else:
                assert field.description, f"{path}{name} has no docstring"

    check(Config, "")
