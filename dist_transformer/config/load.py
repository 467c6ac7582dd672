"""Defaults, then a preset, then YAML, then `section.key=value`: one frozen `Config`, or all problems at once."""

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from dist_transformer.config.base import section_of
from dist_transformer.config.schema import Config
from dist_transformer.errors import ConfigError

_PACKAGE = Path(__file__).resolve().parent.parent


def shipped_files(folder: str) -> Path:
    """The folder `configs`, `launch` or `slurm`: at the top of a checkout, inside the package in a wheel."""
    inside = _PACKAGE / "_files" / folder
    return inside if inside.is_dir() else _PACKAGE.parent / folder


def preset_names() -> list[str]:
    """Names that `model.preset` may take."""
    return sorted(path.stem for path in (shipped_files("configs") / "model").glob("*.yaml"))


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, apply `section.key=value` overrides, validate.

    Raises:
        ConfigError: with every problem found, one a line.
    """
    path = Path(path)
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such configuration file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        line = f", line {where.line + 1}" if where else ""
        raise ConfigError(f"{path}{line}: not valid YAML: {getattr(error, 'problem', error)}") from None
    if not isinstance(tree, dict):
        raise ConfigError(
            f"{path}: should hold sections such as `run:` and `data:`, not {type(tree).__name__}"
        )
    return build_config(tree, str(path), overrides)


def build_config(
    tree: dict[str, Any], source: str = "configuration", overrides: Sequence[str] = ()
) -> Config:
    """Apply `section.key=value` overrides to a nested dictionary and validate it.

    Raises:
        ConfigError: with every problem found, one a line.
    """
    unreadable = []
    for override in overrides:
        try:
            _apply_override(tree, override)
        except ConfigError as error:
            unreadable.append(str(error))
    # A section whose fields are all commented out is null in YAML.
    tree = {name: {} if section is None else section for name, section in tree.items()}
    problems = []
    if isinstance(tree.get("model"), dict) and tree["model"].get("preset") is not None:
        try:
            tree["model"] = merge(_load_preset(tree["model"]["preset"]), tree["model"])
        except ConfigError as error:
            problems.append(str(error))
            del tree["model"]  # Fields over an unknown preset cannot be judged.
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        problems += [_sentence(problem) for problem in error.errors()]
    if unreadable or problems:
        raise ConfigError("\n".join([*unreadable, *(f"{source}: {problem}" for problem in problems)]))
    return config


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML; loading it gives an equal `Config`."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _load_preset(name: object) -> dict[str, Any]:
    names = preset_names()
    if name not in names:
        close = difflib.get_close_matches(str(name), names, n=2)
        hint = f"did you mean {' or '.join(close)}?" if close else f"there are {', '.join(names)}"
        raise ConfigError(f"model.preset={name} is not a preset: {hint}")
    preset = yaml.safe_load((shipped_files("configs") / "model" / f"{name}.yaml").read_text(encoding="utf-8"))
    assert isinstance(preset, dict)
    return preset


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not all(key.split(".")):
        raise ConfigError(f"'{override}' is not an override: write section.key=value")
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError:
        raise ConfigError(f"'{override}': the value is not valid YAML") from None
    if isinstance(parsed, str):
        parsed = _as_number(parsed)
    *path, last = key.split(".")
    node: Any = tree
    for part in path:
        node = _inside(node, part, override)
    node[_place(node, last, override)] = parsed


def _inside(node: Any, part: str, override: str) -> Any:
    """What a part of an override's path leads to: a section, made where there is none, or a list."""
    place = _place(node, part, override)
    if isinstance(node, dict) and node.get(place) is None:
        node[place] = {}
    if not isinstance(node[place], dict | list):
        raise ConfigError(f"'{override}': {part} is a value, not a section")
    return node[place]


def _place(node: Any, part: str, override: str) -> str | int:
    """The key of a section, or the place in a list: `data.mixture.0.weight`."""
    if not isinstance(node, list):
        return part
    if not part.isdecimal() or int(part) >= len(node):
        there = f"0 to {len(node) - 1}" if node else "none yet"
        raise ConfigError(f"'{override}': {part} is not the number of an item ({there})")
    return int(part)


def _as_number(text: str) -> str | float:
    """YAML 1.1 reads 1e-4 as a string; nobody means that."""
    try:
        return float(text) if any(c.isdigit() for c in text) and "e" in text.lower() else text
    except ValueError:
        return text


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """A nested dictionary with another's values over its own."""
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(base.get(key), dict)
        merged[key] = merge(base[key], value) if both else value
    return merged


def _sentence(problem: Any) -> str:
    """One pydantic error as a sentence: path, value, and what would be valid."""
    path = ".".join(str(part) for part in problem["loc"]) or "configuration"
    kind, value = problem["type"], problem["input"]
    if kind == "extra_forbidden":
        known = _known_keys(problem["loc"][:-1])
        close = difflib.get_close_matches(str(problem["loc"][-1]), known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"known here: {', '.join(known)}"
        return f"{path}: unknown key: {hint}"
    if kind == "missing":
        return f"{path}: required and not given"
    if kind == "model_type":
        return (
            f"{path}={value!r}: should be a section with the fields {', '.join(_known_keys(problem['loc']))}"
        )
    if kind == "tuple_type":
        return f"{path}={value!r}: should be a list"
    message = str(problem["msg"]).removeprefix("Value error, ")
    if kind == "value_error":
        return message if path == "configuration" else f"{path}: {message}"
    return f"{path}={value!r}: {message[0].lower()}{message[1:]}"


def _known_keys(loc: Sequence[str | int]) -> list[str]:
    model: type[BaseModel] = Config
    for part in loc:
        if isinstance(part, int):
            continue  # an item of a list of sections: the list's field led to the section already
        field = model.model_fields.get(part)
        nested = section_of(field.annotation) if field else None
        if nested is None:
            return []
        model = nested
    return list(model.model_fields)
