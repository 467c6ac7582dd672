"""Imports go strictly downwards (docs/architecture.md): nothing imports its own or a higher layer's siblings."""

import ast
from collections.abc import Iterator
from pathlib import Path

import dist_transformer

PACKAGE = Path(dist_transformer.__file__).parent

# Module to layer; a module may import modules of lower layers, and its own package.
LAYERS = {
    "errors": 0,
    "config": 1,
    "model": 2,
    "data": 2,
    "tracking": 2,
    "checkpoints": 2,
    "scoring": 2,
    "parallel": 3,
    "engine": 4,
    "generate": 4,
    "train": 5,
    "interop": 5,
    "launcher": 5,
    "plan": 5,
    "cli": 6,
    "__main__": 7,
}
# Who alone may import what, anywhere in a file.
ONLY = {
    "deepspeed": {"engine"},
    "wandb": {"tracking"},
    "webdataset": {"data"},
    "transformers": {"interop"},
    "ctranslate2": {"interop"},
    "sacrebleu": {"scoring"},
    "rapidfuzz": {"scoring"},
}
# What a layer may not import at all. `data` gets its rank as numbers; `model` knows no rank.
NEVER = {
    "config": {"torch", "deepspeed", "numpy"},
    "cli": {"torch", "deepspeed"},
    "model": {"torch.distributed", "deepspeed"},
    "data": {"torch.distributed", "deepspeed"},
    "generate": {"torch.distributed", "deepspeed"},
}


def imports(path: Path) -> Iterator[str]:
    """Every module that a file names in an import, lazy ones too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def modules() -> Iterator[tuple[str, Path]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        relative = path.relative_to(PACKAGE)
        if relative.parts[0] not in {"__init__.py", "_files"}:
            yield relative.parts[0].removesuffix(".py"), path


def test_every_module_has_a_layer() -> None:
    assert {name for name, _ in modules()} == set(LAYERS)


def test_imports_go_downwards() -> None:
    wrong = []
    for name, path in modules():
        for imported in imports(path):
            parts = imported.split(".")
            if parts[0] != "dist_transformer" or len(parts) < 2 or parts[1] not in LAYERS or parts[1] == name:
                continue
            if LAYERS[parts[1]] >= LAYERS[name]:
                wrong.append(
                    f"{path.relative_to(PACKAGE)} imports {imported}: {LAYERS[name]} to {LAYERS[parts[1]]}"
                )
    assert not wrong, "\n".join(wrong)


def test_third_parties_stay_where_they_belong() -> None:
    wrong = []
    for name, path in modules():
        for imported in imports(path):
            root = imported.split(".")[0]
            if name not in ONLY.get(root, {name}):
                wrong.append(f"{path.relative_to(PACKAGE)} imports {root}: only {ONLY[root]} may")
            if any(imported == never or imported.startswith(f"{never}.") for never in NEVER.get(name, ())):
                wrong.append(f"{path.relative_to(PACKAGE)} imports {imported}")
    assert not wrong, "\n".join(wrong)
