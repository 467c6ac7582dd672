"""`docs/configuration.md`, written from the docstrings of the schema.

python -m dist_transformer.config.describe > docs/configuration.md
"""

import types
from collections.abc import Iterator
from typing import Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from dist_transformer.config.base import section_of
from dist_transformer.config.schema import OWNED_DEEPSPEED_KEYS, Config

_PREAMBLE = """\
# Configuration

<!-- Written by `python -m dist_transformer.config.describe`; edit the docstrings in dist_transformer/config/. -->

A run is described by one YAML file with the sections below. Every field has a default, except those marked
**required**. Four layers are put on top of each other, each one over the one before:

1. the defaults in the tables below;
2. the preset, if `model.preset` names one: a file in [configs/model/](../configs/model), for the section `model` only;
3. the YAML file;
4. overrides on the command line, `section.key=value`, from left to right.

So the preset comes first, and single fields change it:

```yaml
run: {dir: runs/example}
model: {preset: t5_v1_1_small, n_encoder_layers: 4}     # the preset, with fewer encoder layers
data: {train: shards/books, eval: shards/books}
train: {steps: 1000, global_batch_size: 64, micro_batch_size: 8, precision: fp32}
```

An override is read as YAML: `data.eval=null`, `tracking.tensorboard=true`, `optimizer.lr=1e-3`,
`'optimizer.betas=[0.9, 0.95]'` (the quotes are for the shell). A longer path reaches nested sections:
`model.encoder.d_ff=1024`, `tracking.wandb.mode=offline`.

An override of `model.preset` replaces the name only: single fields that the YAML file gives stay on top of the new
preset. A field set to `null` in the YAML file is null, whatever the preset says.

Check a file, and see it with everything filled in, without a GPU and without starting anything:

```bash
.venv/bin/dist-transformer config configs/quickstart.yaml
.venv/bin/dist-transformer config configs/quickstart.yaml train.steps=10 --field train.steps
```

All problems are reported at once, each in a sentence, with exit code 2. An unknown key is a problem too. What only
the data or the number of ranks can tell (the vocabulary, whether batch sizes divide) is checked when training starts,
before the first step. `RUN_DIR/config.yaml` is the resolved configuration of the run; it can be used as a
configuration file again.

Accumulation steps are never given: they are `global_batch_size / (micro_batch_size x data-parallel ranks)`, and must
come out whole.

## DeepSpeed's own settings

DeepSpeed's configuration is built from the fields below. The buckets and other details of each ZeRO stage come from
a file that you can read: `configs/deepspeed/zero_N.yaml` for `parallel.zero_stage: N`, and
`configs/deepspeed/zero_3_offload.yaml` for `parallel.offload: all`. Keys under `deepspeed:` are merged over it:

```yaml
deepspeed: {zero_optimization: {reduce_bucket_size: 100000000}}
```

These keys are refused there, because a field of ours decides them:

| DeepSpeed key | use instead |
|---|---|
"""


def describe() -> str:
    """The whole page."""
    lines = [_PREAMBLE + "\n".join(f"| `{key}` | `{ours}` |" for key, ours in _refused_rows())]
    for path, section in sections():
        lines += ["", f"{'#' * (2 + path.count('.'))} {path}", ""]
        lines += [(section.__doc__ or "").strip(), "", *_table(path, section), *_default_list(path)]
    lines += [
        "",
        "## deepspeed",
        "",
        f"{_meaning(Config.model_fields['deepspeed'])} A mapping; empty by default.",
    ]
    return "\n".join(lines) + "\n"


def sections() -> Iterator[tuple[str, type[BaseModel]]]:
    """Every section with its path: the top ones in the order of `Config`, each followed by those inside it."""
    yield from _nested("", Config)


def _nested(prefix: str, model: type[BaseModel]) -> Iterator[tuple[str, type[BaseModel]]]:
    for name, field in model.model_fields.items():
        if (section := section_of(field.annotation)) is not None:
            yield prefix + name, section
            yield from _nested(f"{prefix}{name}.", section)


def _refused_rows() -> Iterator[tuple[str, str]]:
    for key, ours in OWNED_DEEPSPEED_KEYS.items():
        yield key, ours.partition(" (")[0].replace(" and ", "` and `")


def _table(path: str, section: type[BaseModel]) -> list[str]:
    rows = ["| field | type | default | meaning |", "|---|---|---|---|"]
    for name, field in section.model_fields.items():
        kind = type_in_words(field.annotation, field.metadata)
        cells = (f"`{name}`", kind, _default(path, name, field), _meaning(field))
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return rows


def _meaning(field: FieldInfo) -> str:
    return " ".join((field.description or "").split())


def _default(path: str, name: str, field: FieldInfo) -> str:
    if field.is_required():
        return "**required**"
    if section_of(field.annotation):
        empty = "`[]`; " if field.default == () else ""
        return f"{empty}see [{path}.{name}](#{path.replace('.', '')}{name})"
    return f"`{in_yaml(field.default)}`"


def _default_list(path: str) -> list[str]:
    """The default of a list of sections, as it would be written in a YAML file."""
    field: FieldInfo | None = None
    model: type[BaseModel] = Config
    for name in path.split("."):
        field = model.model_fields[name]
        model = section_of(field.annotation) or model
    if field is None or not isinstance(field.default, tuple) or not field.default:
        return []
    name = path.rpartition(".")[2]
    return [
        "",
        "The default:",
        "",
        "```yaml",
        f"{name}:",
        *(f"- {in_yaml(item)}" for item in field.default),
        "```",
    ]


def in_yaml(value: object) -> str:
    """A plain value as it would be written in a YAML file."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, float):
        # YAML 1.1 takes 1e-09 for text: it wants the point.
        mantissa, e, exponent = f"{value:g}".partition("e")
        mantissa = mantissa if "." in mantissa else f"{mantissa}.0"
        return f"{mantissa}e{int(exponent)}" if e else mantissa
    if isinstance(value, tuple):
        return "[" + ", ".join(in_yaml(item) for item in value) + "]"
    if isinstance(value, BaseModel):
        given = {name: field for name, field in value if field != type(value).model_fields[name].default}
        return "{" + ", ".join(f"{name}: {in_yaml(field)}" for name, field in given.items()) + "}"
    return str(value)


def type_in_words(annotation: Any, metadata: list[Any]) -> str:
    """A field's type for people: `whole number, 1 or more`; `number, at least 0 and below 1, or null`."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if hasattr(annotation, "__metadata__"):
        return type_in_words(arguments[0], [*annotation.__metadata__, *metadata])
    if origin in (Union, types.UnionType):
        inner = [type_in_words(part, metadata) for part in arguments if part is not type(None)]
        comma = "," if any("," in words or " or " in words for words in inner) else ""
        return " or ".join(inner) + f"{comma} or null"
    if origin is Literal:
        *most, last = (f"`{value}`" for value in arguments)
        return f"{', '.join(most)} or {last}"
    if origin is tuple:
        if arguments[-1] is Ellipsis:
            items = "sections" if section_of(arguments[0]) else type_in_words(arguments[0], [])
            return f"list of {items}"
        return f"{len(arguments)} x {type_in_words(arguments[0], [])}"
    if section_of(annotation):
        return "section"
    words = {str: "text", bool: "true or false", int: "whole number", float: "number"}[annotation]
    limits = _limits(metadata, whole=annotation is int)
    return f"{words}, {limits}" if limits else words


def _limits(metadata: list[Any], whole: bool) -> str:
    words = []
    for limit in metadata:
        match limit:
            case annotated_types.Gt(gt=bound) if whole:
                words.append(f"{int(str(bound)) + 1} or more")
            case annotated_types.Ge(ge=bound) if whole:
                words.append(f"{bound} or more")
            case annotated_types.Gt(gt=bound):
                words.append(f"above {bound}")
            case annotated_types.Ge(ge=bound):
                words.append(f"at least {bound}")
            case annotated_types.Lt(lt=bound):
                words.append(f"below {bound}")
            case annotated_types.Le(le=bound):
                words.append(f"at most {bound}")
    return " and ".join(words)


if __name__ == "__main__":
    print(describe(), end="")
