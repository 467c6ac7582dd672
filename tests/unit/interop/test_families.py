"""Which family a model is of, and why it is none."""

import pytest

from dist_transformer.config import ModelConfig, build_config, preset_names
from dist_transformer.errors import ConfigError
from dist_transformer.interop.families import FAMILIES, choose_family
from dist_transformer.interop.names import EMBEDDINGS, match_names
from dist_transformer.model import build_model
from tests.unit.interop.cases import FITS
from tests.unit.model.small import KINDS, small_config


def preset(name: str) -> ModelConfig:
    tree = {"run": {"dir": "x"}, "data": {"train": "x"}, "train": {"steps": 1}}
    return build_config({**tree, "model": {"preset": name, "vocab_size": 100}}).model


@pytest.mark.parametrize("name", preset_names())
def test_presets(name: str) -> None:
    if name.startswith("modern"):
        with pytest.raises(
            ConfigError, match=r"no family .*: t5 \(model\.positions is rotary, not relative_bias"
        ):
            choose_family(preset(name), None)
        return
    assert choose_family(preset(name), None).name == ("marian" if name.startswith("vaswani") else "t5")


@pytest.mark.parametrize("kind", KINDS)
def test_at_most_one_fits_and_names_every_parameter(kind: str) -> None:
    config = small_config(kind)
    fitting = [family for family in FAMILIES.values() if family.misfit(config) is None]
    assert len(fitting) <= 1
    for family in fitting:
        names = [name for name, _ in build_model(config).named_parameters()]
        theirs = match_names(family.table(config), config, names)
        assert len(set(theirs.values())) == len(names) - sum(name in EMBEDDINGS for name in names)


def test_cases_cover_every_family() -> None:
    assert {family for family, _, _ in FITS.values()} == set(FAMILIES)


@pytest.mark.parametrize(
    ("family", "fields", "reason"),
    [
        (
            "t5",
            {"positions": "rotary"},
            "this model is no t5 of Hugging Face's: model.positions is rotary",
        ),
        ("marian", {"n_kv_heads": 2}, "its 4 query heads share 2 key-value heads"),
        ("marian", {"ffn": "swiglu"}, "model.ffn is swiglu, not relu or gelu or gelu_tanh or silu"),
        ("marian", {"head_dim": 4}, "heads of its encoder are 4 wide, not d_model / n_heads"),
        ("marian", {"bias": False}, "model.bias is false, not true"),
        ("bart", {}, "model.positions is sinusoidal, not learned"),
        ("bloom", {}, "--family bloom: there are t5, marian, pegasus, bart, mbart"),
    ],
)
def test_reasons(family: str, fields: dict[str, object], reason: str) -> None:
    sizes = {"preset": "vaswani2017_base", "d_model": 32, "n_heads": 4, "vocab_size": 50, **fields}
    tree = {"run": {"dir": "x"}, "data": {"train": "x"}, "train": {"steps": 1}, "model": sizes}
    with pytest.raises(ConfigError) as caught:
        choose_family(build_config(tree).model, family)
    assert reason in str(caught.value)


def test_stacks_that_differ() -> None:
    sizes = {"preset": "t5_v1_1_small", "vocab_size": 50, "decoder": {"d_ff": 8}}
    tree = {"run": {"dir": "x"}, "data": {"train": "x"}, "train": {"steps": 1}, "model": sizes}
    assert (
        FAMILIES["t5"].misfit(build_config(tree).model) == "encoder and decoder differ in d_ff (1024 and 8)"
    )
