"""Commands that exchange models with other libraries: export, import."""

import argparse
import sys
from pathlib import Path

from dist_transformer.cli.generate import add_weights, choice_of
from dist_transformer.cli.parsing import OBJECTIVES, Commands, add_command

_TARGETS = ("huggingface", "ctranslate2", "safetensors")
_FAMILIES = ("t5", "marian", "pegasus", "bart", "mbart")


def add_interop(commands: Commands) -> None:
    """The commands of this module."""
    export = add_command(
        commands,
        "export",
        "write a run's model for Hugging Face, CTranslate2, or as plain safetensors, with its tokenizer",
        "dist-transformer export runs/translate_multi30k exports/multi30k --to huggingface",
        _export,
    )
    export.add_argument(
        "path", metavar="RUN_DIR|CHECKPOINT", help="a run (its newest checkpoint), or a checkpoint"
    )
    export.add_argument("out", metavar="OUT", help="folder to write")
    export.add_argument("--to", choices=_TARGETS, default="huggingface", help="default: huggingface")
    export.add_argument(
        "--family", choices=_FAMILIES, help="huggingface: its architecture (default: the one that fits)"
    )
    export.add_argument(
        "--quantization",
        metavar="TYPE",
        help="ctranslate2: int8, int8_float32, int8_float16, int8_bfloat16, int16, float16, bfloat16 "
        "(default: float32)",
    )
    export.add_argument("--overwrite", action="store_true", help="replace an export that is there")
    add_weights(export)
    importing = add_command(
        commands,
        "import",
        "make a run directory of a Hugging Face model (T5 v1.1, mT5, Marian, Pegasus, BART, mBART)",
        "dist-transformer import downloads/t5-v1_1-base runs/t5-v1_1-base",
        _import,
    )
    importing.add_argument(
        "source", metavar="HF_DIR", help="a folder with config.json, weights and tokenizer"
    )
    importing.add_argument("out", metavar="RUN_DIR", help="run directory to write; training starts from it")
    importing.add_argument(
        "--tokenizer", metavar="FILE", help="a tokenizer.json with the model's ids, where HF_DIR has none"
    )
    importing.add_argument("--data", metavar="SHARDS", help="data.train of the configuration that is written")
    importing.add_argument(
        "--objective", choices=OBJECTIVES, default="pairs", help="what it does with a text (default: pairs)"
    )
    importing.add_argument("--overwrite", action="store_true", help="replace an import that is there")


def _export(options: argparse.Namespace) -> None:
    from dist_transformer.errors import ConfigError
    from dist_transformer.interop.export import export_run
    from dist_transformer.interop.folders import check_out, new_folder
    from dist_transformer.train.trained_run import TrainedRun

    for option, target in (("family", "huggingface"), ("quantization", "ctranslate2")):
        if getattr(options, option) is not None and options.to != target:
            raise ConfigError(f"--{option} is for --to {target}, not for --to {options.to}")
    out = Path(options.out)
    check_out(out, options.overwrite)
    run = TrainedRun(Path(options.path), choice_of(options))
    with new_folder(out, options.overwrite) as folder:
        from dist_transformer.interop.export import export_run

        what = export_run(
            run.model, run.config, run.tokenizer, folder, options.to, options.family, options.quantization
        )
    print(f"{out}: {what} of {run.checkpoint}{run.describe_weights()}")


def _import(options: argparse.Namespace) -> None:
    from dist_transformer.data.tokenizer import TextTokenizer
    from dist_transformer.errors import DataError
    from dist_transformer.interop.folders import check_out, new_folder
    from dist_transformer.interop.huggingface import read_huggingface
    from dist_transformer.interop.imported_run import check_objective, left_out, write_imported_run
    from dist_transformer.interop.tokenizer import check_tokenizer, read_from_huggingface

    source, out = Path(options.source), Path(options.out)
    check_out(out, options.overwrite, "import")
    imported = read_huggingface(source)
    tokenizer: TextTokenizer | None = None
    if options.tokenizer is not None:
        tokenizer = TextTokenizer.load(options.tokenizer)
        check_tokenizer(tokenizer, len(imported.order), options.tokenizer)
    else:
        try:
            tokenizer = read_from_huggingface(source, imported.order)
        except DataError as error:
            print(
                f"dist-transformer: {error}; without --tokenizer the weights can be trained further, but `generate` "
                f"and `evaluate` cannot read text",
                file=sys.stderr,
            )
    check_objective(options.objective, tokenizer)
    with new_folder(out, options.overwrite, "import") as folder:
        write_imported_run(
            folder, imported, tokenizer, run_dir=out, data=options.data, objective=options.objective
        )
    print(f"{out}: {imported.family} with {imported.n_parameters:,} parameters")
    for note in (*imported.notes(), *left_out(imported.generation)):
        print(note)
    print(
        f"go on with: dist-transformer train {out}/config.yaml run.dir=NEW_RUN data.train=SHARDS train.steps=N"
    )
