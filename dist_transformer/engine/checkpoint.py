"""Going on from a checkpoint, in the layout that wrote it or in any other."""

from pathlib import Path

from torch import Tensor

from dist_transformer.checkpoints.folder import (
    TrainerState,
    check_files,
    check_model,
    read_description,
    read_layout,
    read_trainer_state,
)
from dist_transformer.checkpoints.reader import CheckpointReader
from dist_transformer.config import Config
from dist_transformer.engine.engine import Engine
from dist_transformer.engine.masters import (
    kinds_of,
    live_pieces,
    refresh_parameters,
    release_whole_parameters,
    set_adam_steps,
    tensor_of,
)
from dist_transformer.engine.random_state import random_names, seed_after_resume, set_random_state
from dist_transformer.engine.saving import file_of_rank, layout_of
from dist_transformer.errors import CheckpointError, UserError
from dist_transformer.parallel.collectives import raise_together
from dist_transformer.parallel.mesh import Mesh


def check_checkpoint(path: Path, config: Config, mesh: Mesh) -> None:
    """Refuse a checkpoint that is damaged or of another model. Ranks share the files: follow with `raise_together`.

    Raises:
        CheckpointError: one sentence that names the first difference and the fix.
    """
    read_trainer_state(path)
    if "average" in read_description(path):
        raise CheckpointError(
            f"{path} is a mean of checkpoints and holds weights only: start a new run with train.init_from={path}"
        )
    checksums = config.checkpoint.verify == "sha256"
    check_files(path, checksums=checksums, share=(mesh.rank, mesh.world_size))
    check_model(path, config.model, "set it back, or start a new run with another run.dir")


def load_checkpoint(engine: Engine, path: Path) -> TrainerState:
    """Weights, optimizer and random generators from a checkpoint that `check_checkpoint` accepts. A collective.

    Raises:
        CheckpointError: on every rank, if any cannot read its part.
    """
    error: UserError | None = None
    try:
        release_whole_parameters(engine)
        _load_tensors(engine, path)
    except CheckpointError as problem:
        error = problem
    raise_together(error, engine.mesh)
    refresh_parameters(engine)
    state = read_trainer_state(path)
    # DeepSpeed's own features count steps too.
    engine.deepspeed.global_steps, engine.deepspeed.skipped_steps = state.step, state.n_bad_steps
    engine.deepspeed.global_samples = state.step * engine.config.train.global_batch_size
    return state


def describe_change(path: Path, config: Config, mesh: Mesh) -> str | None:
    """What is different in the layout of a checkpoint and of this run, for the person who watches; None: nothing.

    Raises:
        CheckpointError: if the checkpoint cannot be read.
    """
    was, now = read_layout(path), layout_of(config, mesh)
    if was == now:
        return None
    dropout = (
        "dropout goes on as it was" if _is_same_randomness(path, config, mesh) else "dropout is seeded anew"
    )
    return f"{path.name} was saved with {was}; this run has {now}: {dropout}"


def _load_tensors(engine: Engine, path: Path) -> None:
    mesh = engine.mesh
    with CheckpointReader(path) as reader:
        _check_shapes(engine, reader)
        set_adam_steps(engine, int(read_description(path)["optimizer"]["steps"]))
        kinds = [kind for kind in kinds_of(engine) if kind != "ema" or reader.has("ema")]
        for live in live_pieces(engine):
            for kind in kinds:
                out = tensor_of(engine, live, kind)
                assert out is not None
                reader.fill(kind, live.piece, out)
        if engine.average is not None and "ema" not in kinds:
            engine.average.restart()  # switched on between two starts
        if _is_same_randomness(path, engine.config, mesh):
            _load_random_state(reader, mesh)
        else:
            is_apart = layout_of(engine.config, mesh).sequence_parallel
            seed_after_resume(engine.config.run.seed, read_trainer_state(path).step, mesh, is_apart)


def _check_shapes(engine: Engine, reader: CheckpointReader) -> None:
    """Raises:
    CheckpointError: the parameters are not the model's.
    """
    names = {name for name, _ in engine.model.named_parameters()}
    if odd := sorted(names ^ reader.shapes.keys()):
        where = "only in the checkpoint" if odd[0] in reader.shapes else "only in this model"
        raise CheckpointError(f"{reader.path} is a checkpoint of another model: {odd[0]} is {where}")


def _load_random_state(reader: CheckpointReader, mesh: Mesh) -> None:
    file = file_of_rank(mesh.rank)
    found: dict[str, Tensor] = {}
    for name in random_names(mesh):
        state = reader.tensor(file, name)
        if state is None:
            raise CheckpointError(f"{reader.path / file}: cannot be loaded: it has no {name}")
        found[name] = state
    try:
        set_random_state(found, reader.metadata(file), mesh)
    except (KeyError, ValueError, TypeError, RuntimeError) as error:
        raise CheckpointError(f"{reader.path / file}: cannot be loaded: random generators: {error}") from None


def _is_same_randomness(path: Path, config: Config, mesh: Mesh) -> bool:
    """Whether every rank draws for the same rows and the same activations as when the checkpoint was written."""
    was, now = read_layout(path), layout_of(config, mesh)
    names = ("dp_size", "tp_size", "sequence_parallel", "device")
    return all(getattr(was, name) == getattr(now, name) for name in names)
