"""All that can be wrong with a run is found here, before any rank has started to train."""

import contextlib
import os
import platform
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from dist_transformer.checkpoints.folder import (
    check_model,
    checkpoints_dir,
    find_checkpoint_in,
    latest_checkpoint,
)
from dist_transformer.checkpoints.publish import bring_back
from dist_transformer.checkpoints.reader import StoredWeights
from dist_transformer.config import Config, dump_config
from dist_transformer.config.layout import grad_accum_steps, with_vocabulary
from dist_transformer.data.check import check_data
from dist_transformer.data.manifest import load_manifest, write_atomically
from dist_transformer.data.tokenizer import TextTokenizer
from dist_transformer.engine.checkpoint import check_checkpoint
from dist_transformer.errors import CheckpointError, ConfigError, UserError
from dist_transformer.parallel.collectives import barrier, gather_objects, raise_together
from dist_transformer.parallel.mesh import Mesh
from dist_transformer.tracking import check_tracking
from dist_transformer.tracking.exits import read_attempt
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


def _check_free(run_dir: Path) -> None:
    """Two trainings in one folder would remove each other's checkpoints. In batch jobs, `job begin` has looked.

    Raises:
        ConfigError: a process of this node trains in it.
    """
    attempt = None if "SLURM_JOB_ID" in os.environ else read_attempt(run_dir)
    if attempt is None or attempt.get("host") != platform.node() or attempt.get("pid") == os.getpid():
        return
    try:
        # Of a process that has ended, this may be another one's number.
        command = Path(f"/proc/{attempt['pid']}/cmdline").read_bytes()
    except (OSError, KeyError):
        return
    if b"dist_transformer" in command or b"dist-transformer" in command:
        raise ConfigError(
            f"run.dir={run_dir} is being trained by process {attempt['pid']}: wait for its end, stop it with "
            f"dist-transformer cancel {run_dir}, or name another run.dir"
        )


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
    _check_free(run_dir)
    return config, TextTokenizer.load(summary.tokenizer_path)


def record_inputs(config: Config, mesh: Mesh, start_step: int) -> None:
    """Write what the run needs to be used later, wherever its shards are then: configuration and tokenizer.

    A configuration that differs from the last start's is written over it; the old one is kept beside. A collective.

    Raises:
        ConfigError: on every rank, if they cannot be written; what was there is whole.
    """
    error: ConfigError | None = None
    run_dir = Path(config.run.dir)
    if mesh.is_rank_zero:
        try:
            _keep_inputs(config, run_dir, start_step)
        except OSError as problem:
            error = unwritable(run_dir, problem)
    raise_together(error, mesh)


def _keep_inputs(config: Config, run_dir: Path, start_step: int) -> None:
    path, text = run_dir / "config.yaml", dump_config(config)
    before = path.read_text(encoding="utf-8") if path.exists() else text
    kept = run_dir / f"config.until-step-{start_step:08d}.yaml"
    if (
        before != text and not kept.exists()
    ):  # one that is there has trained up to this step, the one after it nothing
        write_atomically(kept, before)
    write_atomically(path, text)
    tokenizer = load_manifest(config.data.corpora()[0].train, config.data).tokenizer_path
    write_atomically(run_dir / "tokenizer.json", tokenizer.read_text(encoding="utf-8"))


def unwritable(run_dir: Path, problem: OSError) -> ConfigError:
    """The sentence about it."""
    return ConfigError(f"run.dir={run_dir}: cannot be written: {problem.strerror or problem}")


def find_checkpoint(config: Config, mesh: Mesh) -> Path | None:
    """The checkpoint that the run goes on from; None: it starts, from `train.init_from` where given. A collective.

    Raises:
        UserError: on every rank, if what is there cannot be used on any.
    """
    error: UserError | None = None
    checkpoint: Path | None = None
    if mesh.is_rank_zero:
        with contextlib.suppress(OSError):  # then what is missing is said below
            bring_back(checkpoints_dir(Path(config.run.dir)))
    barrier(mesh)
    try:
        checkpoint = latest_checkpoint(Path(config.run.dir))
        if checkpoint is not None:
            check_checkpoint(checkpoint, config, mesh)
        else:
            _initial_checkpoint(config)
    except UserError as problem:
        error = problem
    raise_together(error, mesh)
    _check_same(checkpoint, mesh)
    return checkpoint


def _check_same(checkpoint: Path | None, mesh: Mesh) -> None:
    """A node whose file system lags behind would train on with other weights."""
    found = gather_objects("none" if checkpoint is None else checkpoint.name, mesh)
    if len(set(found)) > 1:
        others = "; ".join(
            f"{name}: ranks {[r for r, n in enumerate(found) if n == name]}" for name in sorted(set(found))
        )
        error = CheckpointError(
            f"ranks see different newest checkpoints ({others}): is run.dir the same folder on all nodes?"
        )
        error.on_every_rank = True
        raise error


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
