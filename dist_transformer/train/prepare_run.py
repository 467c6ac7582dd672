"""All that can be wrong with a run is found here, before any rank has started to train."""

import shutil
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from dist_transformer.checkpoints.folder import check_model, find_checkpoint_in, latest_checkpoint
from dist_transformer.checkpoints.reader import StoredWeights
from dist_transformer.config import Config, dump_config
from dist_transformer.config.layout import grad_accum_steps
from dist_transformer.data.check import check_data
from dist_transformer.data.manifest import load_manifest
from dist_transformer.data.tokenizer import TextTokenizer
from dist_transformer.engine.checkpoint import check_checkpoint
from dist_transformer.errors import CheckpointError, ConfigError, UserError
from dist_transformer.parallel.collectives import raise_together
from dist_transformer.parallel.mesh import Mesh
from dist_transformer.tracking import check_tracking
from dist_transformer.train.selection import check_selection


def prepare_run(config: Config, mesh: Mesh) -> tuple[Config, TextTokenizer]:
    """Check data, batch sizes and outputs, and fill in what only the data knows (the vocabulary). A collective.

    Raises:
        UserError: on every rank, if it fails on any.
    """
    error: UserError | None = None
    prepared: tuple[Config, TextTokenizer] | None = None
    try:
        prepared = _prepare(config, mesh.dp_size)
    except UserError as problem:
        error = problem
    raise_together(error, mesh)
    assert prepared is not None
    return prepared


def _prepare(config: Config, dp_size: int) -> tuple[Config, TextTokenizer]:
    grad_accum_steps(config, dp_size)
    check_tracking(config.tracking)
    check_selection(config)
    summary = check_data(config.data, dp_size=dp_size, workers=config.data.workers)
    config = with_vocabulary(config, summary.vocab_size)
    run_dir = Path(config.run.dir)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise ConfigError(f"run.dir={config.run.dir}: cannot be made: {problem.strerror}") from None
    return config, TextTokenizer.load(summary.tokenizer_path)


def keep_inputs(config: Config, run_dir: Path, start_step: int) -> None:
    """Write what the run needs to be used later, wherever its shards are then: configuration and tokenizer.

    A configuration that differs from the last start's is written over it; the old one is kept beside.
    """
    path, text = run_dir / "config.yaml", dump_config(config)
    if path.exists() and path.read_text(encoding="utf-8") != text:
        path.replace(run_dir / f"config.until-step-{start_step:08d}.yaml")
    path.write_text(text, encoding="utf-8")
    manifest = load_manifest(config.data.corpora()[0].train, config.data)
    shutil.copyfile(manifest.tokenizer_path, run_dir / "tokenizer.json")


def find_checkpoint(config: Config, mesh: Mesh) -> Path | None:
    """The checkpoint that the run goes on from; None: it starts, from `train.init_from` where given. A collective.

    Raises:
        UserError: on every rank, if what is there cannot be used on any.
    """
    error: UserError | None = None
    checkpoint: Path | None = None
    try:
        checkpoint = latest_checkpoint(Path(config.run.dir))
        if checkpoint is not None:
            check_checkpoint(checkpoint, config, mesh)
        else:
            _initial_checkpoint(config)
    except UserError as problem:
        error = problem
    raise_together(error, mesh)
    return checkpoint


def with_vocabulary(config: Config, n_tokens: int) -> Config:
    """The configuration with `model.vocab_size` known.

    Raises:
        ConfigError: if the model's vocabulary is smaller than the tokenizer's.
    """
    given = config.model.vocab_size
    if given is not None and given < n_tokens:
        raise ConfigError(
            f"model.vocab_size={given} is smaller than the tokenizer's {n_tokens} tokens: "
            f"set it to null, or to {n_tokens} or more"
        )
    unit = config.model.pad_vocab_to
    size = given if given is not None else -(-n_tokens // unit) * unit
    return config.model_copy(update={"model": config.model.model_copy(update={"vocab_size": size})})


def initial_weights(config: Config) -> Mapping[str, Tensor] | None:
    """Weights of `train.init_from`, each read when it is asked for; None: they are drawn.

    Raises:
        CheckpointError: if there is no checkpoint, or it is of another model.
    """
    checkpoint = _initial_checkpoint(config)
    return None if checkpoint is None else StoredWeights(checkpoint)


def _initial_checkpoint(config: Config) -> Path | None:
    source = config.train.init_from
    if source is None:
        return None
    try:
        checkpoint = find_checkpoint_in(Path(source))
    except CheckpointError as error:
        raise CheckpointError(f"train.init_from: {error}") from None
    check_model(checkpoint, config.model, "give this run the same model section, or another train.init_from")
    return checkpoint
