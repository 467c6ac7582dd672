"""`dist-transformer data`: look after folders of shards."""

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from dist_transformer.cli.inspect import add_inspect
from dist_transformer.cli.parsing import Commands, add_command, positive
from dist_transformer.errors import ConfigError, DataError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dist_transformer.config.data import DataConfig
    from dist_transformer.data.verify import ShardReport


def add_data(commands: Commands) -> None:
    """The group and its commands."""
    group = add_command(
        commands,
        "data",
        "look at folders of shards, and after them: inspect, verify, index",
        "dist-transformer data verify shards/books",
        None,
    )
    parsers: Commands = group.add_subparsers(title="commands", metavar="COMMAND", required=True)
    add_inspect(parsers)
    _add_verify(parsers)
    _add_index(parsers)


def _add_verify(commands: Commands) -> None:
    parser = add_command(
        commands,
        "verify",
        "read every shard of a folder and say which are damaged; exit code 1 if any is",
        "dist-transformer data verify shards/books",
        _verify,
    )
    parser.add_argument("folder", metavar="DIR|URL", help="a folder of shards; {a,b} and {0..3} name several")
    _add_shared(parser)


def _add_index(commands: Commands) -> None:
    parser = add_command(
        commands,
        "index",
        "make existing WebDataset tars trainable where they are: writes a manifest and a copy of the tokenizer",
        "dist-transformer data index '/disk/c4-{0000..1023}.tar' --field txt --tokenizer t5.json --out shards/c4",
        _index,
    )
    parser.add_argument(
        "tars", nargs="+", metavar="TARS", help="paths or URLs of plain tars; {a,b} and {0..3} name several"
    )
    parser.add_argument(
        "--field",
        metavar="NAME",
        help="text: the member that holds a document: txt for KEY.txt, json:text for the text in KEY.json",
    )
    parser.add_argument("--source-field", metavar="NAME", help="pairs: the member that holds the source")
    parser.add_argument("--target-field", metavar="NAME", help="pairs: the member that holds the target")
    parser.add_argument("--tokenizer", required=True, metavar="FILE", help="the tokenizer.json to train with")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write")
    parser.add_argument("--eval-tars", nargs="+", default=[], metavar="TARS", help="tars that are held out")
    parser.add_argument("--overwrite", action="store_true", help="replace a manifest that is there")
    _add_shared(parser)


def _add_shared(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workers", type=positive, metavar="N", help="processes (default: all cores)")
    parser.add_argument(
        "--cache-dir",
        metavar="DIR",
        help="where files from URLs are kept, as data.remote.cache_dir (default: ~/.cache/dist_transformer/shards)",
    )


def _workers(options: argparse.Namespace) -> int:
    return options.workers or len(os.sched_getaffinity(0))


def _data(options: argparse.Namespace, folder: str) -> "DataConfig":
    from dist_transformer.config.data import DataConfig, RemoteConfig

    return DataConfig(train=folder, remote=RemoteConfig(cache_dir=options.cache_dir))


def _verify(options: argparse.Namespace) -> None:
    from dist_transformer.data.pool import progress
    from dist_transformer.data.verify import n_bytes_of, verify

    data = _data(options, options.folder)
    with progress("verifying", n_bytes_of(options.folder, data)) as advance:
        reports = list(verify(options.folder, data, _workers(options), advance))
    _print_table(reports)
    bad = sorted((r for r in reports if r.problem), key=lambda r: (r.split, r.info.location))
    for report in bad:
        print(report.problem)
    if bad:
        raise DataError(f"{len(bad)} of {len(reports)} shards are damaged")


def _print_table(reports: "Sequence[ShardReport]") -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("split", *("shards", "samples", "tokens", "GiB", "bad shards", "bad samples"))
    for column in table.columns[1:]:
        column.justify = "right"
    for split in ("train", "eval"):
        found = [report for report in reports if report.split == split]
        infos = [report.info for report in found]
        if found:
            table.add_row(
                split,
                f"{len(found):,}",
                f"{sum(info.n_samples for info in infos):,}",
                f"{sum(info.n_source_tokens + info.n_target_tokens for info in infos):,}",
                f"{sum(info.bytes for info in infos) / 2**30:.3f}",
                f"{sum(bool(report.problem) for report in found):,}",
                f"{sum(report.n_bad for report in found):,}",
            )
    Console().print(table)


def _index(options: argparse.Namespace) -> None:
    sides = (options.source_field, options.target_field)
    if bool(options.field) == any(sides) or (any(sides) and not all(sides)):
        raise ConfigError("give --field for plain text, or --source-field and --target-field for pairs")
    from dist_transformer.data.index import expand_tars, index_tars
    from dist_transformer.data.pool import progress

    with progress("indexing", len(expand_tars([*options.tars, *options.eval_tars]))) as advance:
        summary = index_tars(
            options.tars,
            Path(options.out),
            fields=(options.field,) if options.field else sides,
            tokenizer=options.tokenizer,
            eval_tars=options.eval_tars,
            n_workers=_workers(options),
            overwrite=options.overwrite,
            remote=_data(options, options.out).remote,
            advance=advance,
        )
    train = summary.manifest.train
    n_tokens = sum(info.n_source_tokens + info.n_target_tokens for info in train)
    print(
        f"{options.out}: {sum(info.n_samples for info in train):,} samples in {len(train)} tars, about "
        f"{n_tokens:,} tokens, {sum(info.n_samples for info in summary.manifest.eval):,} held out"
    )
    if summary.n_bad:
        print(f"{summary.n_bad:,} samples lack a member: train with data.on_bad_shard=skip to leave them out")
    print(f"train on it: launch/local.sh CONFIG.yaml data.train={options.out}")
