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
from dist_transformer.config.data import DenoiserConfig
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
        ["data.objective='spans': ", "'span_corruption', 'ul2', 'prefix_lm' or 'pairs'"],
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
        (
            {"data": {"mixture": [{"train": "a"}, {"train": "b", "wieght": 1}]}},
            "data.mixture.1.wieght",
            "weight",
        ),
    ],
)
def test_unknown_keys_are_answered_at_every_depth(tree: dict[str, Any], path: str, meant: str) -> None:
    assert f"configuration: {path}: unknown key: did you mean {meant}?" in problems_of({**MINIMAL, **tree})


def test_a_key_like_no_other_is_answered_with_all_that_are_known() -> None:
    [found] = problems_of({**MINIMAL, "recompute": {"zzz": 1}})
    assert found == "configuration: recompute.zzz: unknown key: known here: encoder, decoder, every"


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
        ("data.denoisers=[{mode: S, density: 0.5}]", ("data", "denoisers"), (DenoiserConfig(mode="S", density=0.5),)),
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


def test_overrides_reach_items_of_a_list(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    parts = [{"train": "a", "weight": 1}, {"train": "b", "weight": 1}]
    path.write_text(yaml.safe_dump({**MINIMAL, "data": {"mixture": parts}}))
    mixture = load_config(path, ["data.mixture.1.weight=3", "data.mixture.0.eval=c"]).data.mixture
    assert [(part.train, part.eval, part.weight) for part in mixture] == [("a", "c", 1), ("b", None, 3)]
    for override in ("data.mixture.2.weight=3", "data.mixture.weight=3", "data.mixture.-1.weight=3"):
        with pytest.raises(ConfigError, match=r"is not the number of an item \(0 to 1\)"):
            load_config(path, [override])
    with pytest.raises(ConfigError, match="1 is a value, not a section"):
        load_config(path, ["optimizer.betas=[0.9, 0.9]", "optimizer.betas.1.x=3"])


PART = {"train": "a/books"}


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ({}, "data.train: required and not given"),
        ({"mixture": []}, "data.train: required and not given"),
        ({"train": "x", "mixture": [PART]}, "data.train='x': mixture is given too"),
        ({"eval": "x", "mixture": [PART]}, "data.eval='x': mixture is given too"),
        ({"mixture": PART}, "data.mixture={'train': 'a/books'}: should be a list"),
        ({"mixture": [3]}, "data.mixture.0=3: should be a section with the fields train, eval, name"),
        ({"mixture": [{"eval": "x"}]}, "data.mixture.0.train: required and not given"),
        ({"mixture": [{**PART, "weight": 0}]}, "data.mixture.0.weight=0: input should be greater than 0"),
        (
            {"mixture": [PART, {"train": "b", "weight": 2}]},
            "data.mixture.0.weight=None: other corpora have a weight: give one to all, or to none",
        ),
        (
            {"mixture": [PART, {"train": "b/books/"}]},
            "data.mixture.1.name='books': an earlier corpus has this name",
        ),
        (
            {"mixture": [{"train": "c", "name": "a b"}, {"train": "d", "name": "a_b"}]},
            "data.mixture.1.name='a_b': an earlier corpus has this name",
        ),
        (
            {"mixture": [{**PART, "objective": "pairs", "noise_density": 0.3}]},
            "data.mixture.0.noise_density=0.3: has no effect on objective=pairs: leave it out",
        ),
        (
            {"mixture": [{**PART, "too_long": "drop"}]},
            "data.mixture.0.too_long='drop': has no effect on objective=span_corruption: leave it out",
        ),
        ({"train": "x", "mixing_temperature": 2}, "data.mixing_temperature=2.0: needs a mixture"),
        ({"train": "x", "bucket_tokens": 512}, "data.bucket_tokens=512: needs packing=false"),
        (
            {"train": "x", "packing": False, "bucket_tokens": 511},
            "data.bucket_tokens=511: is less than the 512 tokens that one sample may need",
        ),
        (
            {"train": "x", "subword_dropout_target": 0.1},
            "data.subword_dropout_target=0.1: has no effect without objective=pairs: leave it out",
        ),
        ({"train": "x", "denoisers": []}, "data.denoisers=[]: give at least one"),
        (
            {"train": "x", "denoisers": [{"mode": "R", "density": 0.1}]},
            "data.denoisers.0.mean_span=None: mode R needs one",
        ),
        (
            {"train": "x", "denoisers": [{"mode": "S", "mean_span": 3, "density": 0.1}]},
            "data.denoisers.0.mean_span=3.0: mode S has no mean_span",
        ),
    ],
)
def test_data_that_does_not_fit_together(data: dict[str, Any], says: str) -> None:
    [found] = problems_of({**MINIMAL, "data": data})
    assert found.startswith(f"configuration: {says}")


def test_corpora_are_filled_in_from_the_section() -> None:
    data = build_config(
        {
            **MINIMAL,
            "data": {
                "noise_density": 0.3,
                "mixture": [
                    {"train": "shards/books/", "mean_noise_span": 5, "eval": "held"},
                    {"train": "s3://bucket/en-de", "objective": "pairs", "name": "translation"},
                ],
            },
        }
    ).data
    books, translation = data.corpora()
    assert (books.name, books.eval, books.objective) == ("books", "held", "span_corruption")
    assert (books.noise_density, books.mean_noise_span, books.too_long) == (0.3, 5, "truncate")
    assert (translation.name, translation.objective, translation.eval) == ("translation", "pairs", None)
    [only] = build_config({**MINIMAL, "data": {"train": "http://host/a.b/c", "eval": "e"}}).data.corpora()
    assert (only.train, only.eval, only.name, only.weight) == ("http://host/a.b/c", "e", "c", None)


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


def test_what_is_ignored_must_be_a_regular_expression() -> None:
    [found] = problems_of({**MINIMAL, "evaluate": {"ignore": "[0-9"}})
    assert "evaluate.ignore" in found and "is no regular expression (unterminated" in found
