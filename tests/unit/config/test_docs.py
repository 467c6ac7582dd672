"""The documents say what is true: reference in sync, commands and options that exist, links that lead somewhere."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from dist_transformer.cli import build_parser
from dist_transformer.config import Config, build_config, load_config, preset_names
from dist_transformer.config.describe import describe, in_yaml, sections
from dist_transformer.config.schema import OWNED_DEEPSPEED_KEYS
from dist_transformer.errors import ConfigError

ROOT = Path(__file__).resolve().parents[3]
# The log and the decisions are history: they name what there was.
HISTORY = {"log.md", "decisions.md"}
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "slurm" / "README.md",
    *(path for path in sorted((ROOT / "docs").glob("*.md")) if path.name not in HISTORY),
]
SCRIPT = re.compile(r"(?:launch|slurm|\.ci)/[\w.-]+")
by_name = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
JOBS_OF = {"slurm/evaluate.sbatch": "evaluate", "slurm/prepare_array.sbatch": "prepare"}
"""Batch scripts that hand their arguments to a command."""


def test_reference_is_in_sync() -> None:
    written = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert written == describe(), "run: python -m dist_transformer.config.describe > docs/configuration.md"


def test_every_section_and_field_has_a_docstring() -> None:
    missing = [path for path, section in sections() if not (section.__doc__ or "").strip()]
    missing += [
        f"{path}.{name}"
        for path, section in sections()
        for name, field in section.model_fields.items()
        if not field.description
    ]
    assert not missing
    plain = {name for name in Config.model_fields if name not in {path for path, _ in sections()}}
    assert plain == {"deepspeed"}
    assert Config.model_fields["deepspeed"].description


def test_defaults_are_written_as_yaml_reads_them() -> None:
    import yaml

    for path, section in sections():
        for name, field in section.model_fields.items():
            if not field.is_required() and f"{path}.{name}" not in {p for p, _ in sections()}:
                read = yaml.safe_load(in_yaml(field.default))
                expected = list(field.default) if isinstance(field.default, tuple) else field.default
                assert read == expected, f"{path}.{name}"


def test_a_default_list_of_sections_is_written_as_yaml_reads_it() -> None:
    """The page's own block, put into a configuration, is the default."""
    import yaml

    [block] = re.findall(r"^```yaml\n(denoisers:\n.*?)^```", describe(), re.S | re.M)
    data = {"train": "x", **yaml.safe_load(block)}
    config = build_config({"run": {"dir": "x"}, "data": data, "train": {"steps": 1}})
    assert config.data.denoisers == Config.model_fields["data"].annotation.model_fields["denoisers"].default  # type: ignore[union-attr]
    assert len(config.data.denoisers) == 7


@pytest.mark.parametrize("key", OWNED_DEEPSPEED_KEYS)
def test_refused_deepspeed_keys_are_refused(key: str) -> None:
    value: object = 1
    for name in reversed(key.split(".")):
        value = {name: value}
    tree = {"run": {"dir": "x"}, "data": {"train": "x"}, "train": {"steps": 1}, "deepspeed": value}
    with pytest.raises(ConfigError, match=re.escape(OWNED_DEEPSPEED_KEYS[key].split(" ")[0])):
        build_config(tree)


def commands(document: Path) -> Iterator[list[str]]:
    """The commands of a document's shell blocks, as words, each side of a pipe by itself."""
    for block in re.findall(r"^```bash\n(.*?)^```", document.read_text(encoding="utf-8"), re.S | re.M):
        block = re.sub(r"^\w+=\$\((.*)\)$", r"\1", block, flags=re.M)  # name=$(command)
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.shlex(line, posix=True, punctuation_chars="|;&>")
            words.whitespace_split = True
            command: list[str] = []
            for word in [*words, ";"]:
                if set(word) <= set("|;&"):
                    if command:
                        yield command
                    command = []
                else:
                    command.append(word)


def without_variables(command: list[str]) -> list[str]:
    while command and re.fullmatch(r"[A-Z_]+=.*", command[0]):
        command = command[1:]
    return command


@by_name
def test_commands_exist(document: Path) -> None:
    makefile = (ROOT / "Makefile").read_text()
    for words in commands(document):
        command = without_variables(words)
        said = f"{document.name}: {shlex.join(words)}"
        program = command[0].removeprefix(".venv/bin/")
        if program == "dist-transformer":
            check_command(command[1:], said)
        elif program == "make":
            targets = [word for word in command[1:] if "=" not in word]
            assert targets and all(re.search(rf"^{target}:", makefile, re.M) for target in targets), said
        elif script := next((word for word in command if SCRIPT.fullmatch(word)), None):
            arguments = command[command.index(script) + 1 :]
            if script in JOBS_OF:
                assert (ROOT / script).exists(), said
                check_command([JOBS_OF[script], *arguments], said)
            else:
                check_script(script, arguments, said)
        elif program == "python":
            module = command[command.index("-m") + 1]
            assert module == "pytest" or (ROOT / f"{module.replace('.', '/')}.py").exists(), said
            assert all((ROOT / w).exists() for w in command if w.startswith("tests/")), said
        else:
            assert program in {"echo", "ls", "wandb", "tensorboard", "cp", "pip"}, f"{said}: unknown program"


def check_command(arguments: list[str], said: str) -> None:
    try:
        options = build_parser().parse_args(arguments)
    except SystemExit as end:
        pytest.fail(f"{said}: {end}")
    if hasattr(options, "config"):
        check_configuration(options.config, options.overrides, said)


def check_script(script: str, arguments: list[str], said: str) -> None:
    assert (ROOT / script).exists(), said
    text = (ROOT / script).read_text()
    config, overrides, skip = None, [], False
    for word in arguments:
        if skip:
            skip = False
        elif word.startswith("--"):
            option = word.partition("=")[0]
            assert re.search(rf"{option}(?![\w-])", text), f"{said}: {script} has no {option}"
            skip = word in {"--nproc", "--max-restarts"}
        elif config is None:
            config = word
        else:
            overrides.append(word)
    if config is not None:
        check_configuration(config, overrides, said)


def check_configuration(path: str, overrides: list[str], said: str) -> None:
    if path.startswith("configs/"):
        try:
            load_config(ROOT / path, overrides)
        except ConfigError as error:
            pytest.fail(f"{said}: {error}")


def inline_code(document: Path) -> list[str]:
    prose = re.sub(r"^```.*?^```", "", document.read_text(encoding="utf-8"), flags=re.S | re.M)
    return re.findall(r"`([^`\n]+)`", prose)


@by_name
def test_inline_commands_files_and_fields_exist(document: Path) -> None:
    known = dict(sections())
    for code in inline_code(document):
        said = f"{document.name}: `{code}`"
        if re.fullmatch(r"(?:dist_transformer|configs|launch|slurm|tests|\.ci)/[\w./-]*", code):
            assert "N" in Path(code).stem or (ROOT / code).exists(), said  # zero_N.yaml, NAME.yaml
        elif re.fullmatch(r"[a-z]+/(?:\w+\.py)?", code) and not code.startswith(("wandb", "tensorboard")):
            folders = (ROOT / "dist_transformer" / code, ROOT / code)
            is_of_run = code in {"checkpoints/", "samples/", "logs/"}
            assert is_of_run or any(path.exists() for path in folders), said
        elif script := re.match(r"((?:launch|slurm)/[\w.]+) (.*)", code):
            check_script(script[1], shlex.split(script[2]), said)
        elif field := re.fullmatch(r"(\w+(?:\.\w+)*)\.(\w+)(?:=.*)?", code):
            is_file = code == "model.safetensors" or any(
                (ROOT / at / code).exists() for at in ("dist_transformer", "slurm")
            )
            if field[1] in known and not is_file:
                assert field[2] in known[field[1]].model_fields, said
        elif code.startswith(("vaswani", "t5_v", "modern_")):
            assert any(name.startswith(code.rstrip("*")) for name in preset_names()), said


@by_name
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text(encoding="utf-8")):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        path = (document.parent / name).resolve() if name else document
        assert path.exists(), f"{document.name}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.M)
            slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in slugs, f"{document.name}: {target}"


def test_parameter_counts_in_the_readme() -> None:
    """At the vocabulary that the table states; the other columns from the presets."""
    from dist_transformer.model import build_model

    rows = re.findall(
        r"^\| `(\w+)` \| ([\d.]+) ([MB]) \| (\d+) \+ (\d+) \| (\d+) \| (\d+) \| (\d+) \((\d+)\) \|",
        (ROOT / "README.md").read_text(encoding="utf-8"),
        re.M,
    )
    assert sorted(row[0] for row in rows) == preset_names()
    for name, size, unit, *shape in rows:
        tree = {"run": {"dir": "x"}, "data": {"train": "x"}, "train": {"steps": 1}}
        model = build_config({**tree, "model": {"preset": name, "vocab_size": 32128}}).model
        stack = model.stack("decoder")
        n_parameters = sum(parameter.numel() for parameter in build_model(model).parameters())
        decimals = len(size.partition(".")[2])
        assert f"{n_parameters / {'M': 1e6, 'B': 1e9}[unit]:.{decimals}f}" == size, name
        found = (model.n_encoder_layers, model.n_decoder_layers, model.d_model, model.d_ff)
        assert [*map(int, shape)] == [*found, stack.n_heads, stack.n_kv_heads], name
