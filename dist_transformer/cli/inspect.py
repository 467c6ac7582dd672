"""`dist-transformer data inspect`: what a folder of shards holds, or what a run would see."""

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_transformer.cli.parsing import Commands, add_command, not_negative, positive

if TYPE_CHECKING:
    from dist_transformer.config import Config


def add_inspect(commands: Commands) -> None:
    """The command, in the group `data`."""
    inspect = add_command(
        commands,
        "inspect",
        "show what a folder of shards holds, or what a run would see",
        "dist-transformer data inspect configs/quickstart.yaml data.noise_density=0.3 --rows 4",
        _inspect,
    )
    inspect.add_argument(
        "what",
        metavar="DIR|URL|CONFIG.yaml",
        help="a folder of shards, with the defaults of a run; or a run's configuration",
    )
    inspect.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="single fields over the configuration"
    )
    inspect.add_argument(
        "--windows",
        type=positive,
        metavar="N",
        default=16,
        help="windows of each corpus that are read for lengths and fill, spread over its shards (default: 16)",
    )
    inspect.add_argument(
        "--rows", type=not_negative, metavar="N", default=2, help="rows shown as text (default: 2)"
    )
    inspect.add_argument(
        "--step",
        type=not_negative,
        metavar="N",
        default=0,
        help="show the first rows after so many steps; lanes are walked up to there (default: 0)",
    )
    inspect.add_argument("--json", action="store_true", help="one JSON object instead of tables")


def _inspect(options: argparse.Namespace) -> None:
    config = _config(options.what, options.overrides)
    from dist_transformer.data.inspect import RunToInspect, inspect_run
    from dist_transformer.data.sample_rows import show_rows

    run = RunToInspect.build(
        config.data, seed=config.run.seed, global_batch_size=config.train.global_batch_size
    )
    inspection = inspect_run(run, options.windows)
    first = options.step * config.train.global_batch_size
    rows = list(show_rows(run.plan, run.tokenizer, first, options.rows))
    if options.json:
        content = dataclasses.asdict(inspection) | {"rows": [dataclasses.asdict(row) for row in rows]}
        print(json.dumps(content, ensure_ascii=False))
        return
    from dist_transformer.cli.inspect_view import show_inspection

    show_inspection(inspection, rows, sys.stdout)


def _config(what: str, overrides: list[str]) -> "Config":
    """The run's configuration; for a folder, one with defaults that fit its kind."""
    from dist_transformer.config import build_config, load_config
    from dist_transformer.data.manifest import load_manifest

    if Path(what).suffix in (".yaml", ".yml"):
        return load_config(what, overrides)
    # What a run needs besides data has no part in it.
    tree: dict[str, Any] = {"run": {"dir": "none"}, "train": {"steps": 1}, "data": {"train": what}}
    config = build_config(tree, what, overrides)
    manifest = load_manifest(what, config.data)
    if manifest.kind == "pairs":
        # The default target length suits span corruption; here it is what the tokens of the two sides ask for.
        shards = manifest.train or manifest.eval
        n_source = sum(shard.n_source_tokens + shard.n_samples for shard in shards)
        n_target = sum(shard.n_target_tokens + shard.n_samples for shard in shards)
        given = tree["data"]  # with the overrides
        given.setdefault("objective", "pairs")
        given.setdefault("max_target_len", max(8, round(config.data.max_source_len * n_target / n_source)))
        config = build_config(tree, what)
    return config
