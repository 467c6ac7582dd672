"""The moving average of the weights: a plain one's values in every layout, saved, resharded, swapped in and out."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dist_transformer.checkpoints.average import write_average
from dist_transformer.checkpoints.folder import TrainerState
from dist_transformer.checkpoints.reader import CheckpointReader, load_weights
from dist_transformer.config import Config, Weights, build_config
from dist_transformer.engine.checkpoint import load_checkpoint
from dist_transformer.engine.engine import Engine
from dist_transformer.engine.saving import save_checkpoint
from tests.dist.harness import Mesh, run_ranks
from tests.dist.resharding import Place, configured, losses, mesh_of
from tests.dist.test_bad_steps import poison, weights_of

DECAY, N_STEPS, BAD_STEP = 0.8, 5, 3
TWIN = Place(1, 1, 0)
PLACES = [Place(1, 2, 0), Place(1, 2, 1), Place(1, 2, 3), Place(2, 1, 1), Place(1, 2, 2, "bf16", "optimizer")]
# Saved by the first, resumed by the second.
CROSSINGS = [(PLACES[1], PLACES[3]), (PLACES[3], PLACES[2]), (PLACES[2], PLACES[0])]


def with_ema(place: Place, run_dir: str, decay: float | None = DECAY) -> Config:
    tree = configured(place, run_dir).model_dump(mode="json")
    tree["train"]["ema_decay"] = decay
    return build_config(tree)


@dataclass
class Found:
    """What rank zero saw of a run in one layout."""

    plain: dict[str, Tensor]
    """Averages of the weights after each applied step, in plain torch."""
    saved: dict[str, Tensor]
    masters: dict[str, Tensor]
    inside: dict[str, Tensor]
    """The model's weights while the average is in use."""
    after: dict[str, Tensor]
    """The model's weights after that."""
    before: dict[str, Tensor]
    n_bytes: int
    """Of the average on this rank, without alignment."""


def train(mesh: Mesh, place: Place, run_dir: str) -> Found:
    """Some steps, one of them skipped, and a checkpoint."""
    engine = Engine(with_ema(place, run_dir), mesh)
    plain = weights_of(engine)
    for step in range(1, N_STEPS + 1):
        handle = poison(engine, float("nan"), in_gradient=False) if step == BAD_STEP else None
        losses(engine, range(step, step + 1))
        if handle is not None:
            handle.remove()
            continue
        for name, weight in weights_of(engine).items():
            plain[name] = DECAY * plain[name] + (1 - DECAY) * weight
    before = weights_of(engine)
    with engine.weights("ema"):
        inside = weights_of(engine)
    after = weights_of(engine)
    path = save_checkpoint(engine, TrainerState(step=N_STEPS))
    assert engine.average is not None
    n_bytes = sum(value.numel() * value.element_size() for value in engine.average.values)
    return Found(plain, load_weights(path, "ema"), load_weights(path), inside, after, before, n_bytes)


def resume(world: Mesh, source: Place, target: Place, folder: str) -> tuple[bool, float]:
    """Whether the average comes over bit for bit; then how far further steps are from those of the layout left."""
    path = Path(folder) / str(source) / "checkpoints" / f"step-{N_STEPS:08d}"
    ends = []
    for place in (source, target):
        engine = Engine(with_ema(place, f"{folder}/{source}-to-{place}"), mesh_of(world, place.tp))
        load_checkpoint(engine, path)
        if place == target:
            at_once = load_weights(save_checkpoint(engine, TrainerState(step=N_STEPS)), "ema")
        losses(engine, range(N_STEPS + 1, N_STEPS + 4))
        ends.append(load_weights(save_checkpoint(engine, TrainerState(step=N_STEPS + 3)), "ema"))
    saved = load_weights(path, "ema")
    is_same = all(torch.equal(saved[name], at_once[name]) for name in saved)
    return is_same, largest(*ends)


def largest(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    assert first.keys() == second.keys()
    return max(float((first[name].float() - second[name].float()).abs().max()) for name in first)


def switched_on_later(world: Mesh, folder: str) -> tuple[bool, bool, bool]:
    """(a run without an average saves none, one that goes on from it begins with its weights, and without it ends)"""
    place = PLACES[1]
    plain = Engine(with_ema(place, f"{folder}/off", None), mesh_of(world, 1))
    losses(plain, range(1, 3))
    path = save_checkpoint(plain, TrainerState(step=2))
    with CheckpointReader(path) as reader:
        has = reader.has("ema")
    engine = Engine(with_ema(place, f"{folder}/on"), mesh_of(world, 1))
    load_checkpoint(engine, path)
    on = save_checkpoint(engine, TrainerState(step=2))
    begins_with_them = largest(load_weights(on, "ema"), load_weights(path)) == 0.0
    load_checkpoint(plain, on)
    again = save_checkpoint(plain, TrainerState(step=3))
    with CheckpointReader(again) as reader:
        has_then = reader.has("ema")
    return has, begins_with_them, has_then


def on_ranks(
    world: Mesh, folder: str
) -> tuple[dict[str, Found], list[tuple[bool, float]], tuple[bool, bool, bool]]:
    found = {str(place): train(mesh_of(world, place.tp), place, f"{folder}/{place}") for place in PLACES}
    return found, [resume(world, *pair, folder) for pair in CROSSINGS], switched_on_later(world, folder)


def twin(world: Mesh, folder: str) -> Found:
    return train(world, TWIN, f"{folder}/twin")


@pytest.fixture(scope="module")
def everything(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Found, dict[str, Found], list[tuple[bool, float]], tuple[bool, bool, bool], list[Found], Path]:
    folder = str(tmp_path_factory.mktemp("averages"))
    unsharded = run_ranks(1, twin, folder)[0]
    ranks = run_ranks(2, on_ranks, folder, limit_s=240)
    found, resumed, later = ranks[0]
    return unsharded, found, resumed, later, [rank[0][str(PLACES[2])] for rank in ranks], Path(folder)


@pytest.mark.parametrize("place", PLACES[:4], ids=map(str, PLACES[:4]))
def test_it_is_the_plain_average_of_the_unsharded_run(place: Place, everything: tuple) -> None:  # type: ignore[type-arg]
    unsharded, found = everything[0], everything[1][str(place)]
    assert largest(found.saved, found.plain) < 5e-7  # norms are about 1: some units in the last place
    assert largest(found.saved, unsharded.plain) < 1e-6
    # The comparison would see the weights themselves, and an average that the skipped step had moved.
    assert largest(found.saved, found.masters) > 1e-4


@pytest.mark.parametrize("place", PLACES, ids=map(str, PLACES))
def test_the_model_takes_it_and_gives_it_back(place: Place, everything: tuple) -> None:  # type: ignore[type-arg]
    found = everything[1][str(place)]
    rounded = {name: value.to(found.inside[name].dtype) for name, value in found.saved.items()}
    assert largest(found.inside, rounded) == 0.0
    assert largest(found.after, found.before) == 0.0
    assert largest(found.inside, found.before) > 0.0


@pytest.mark.parametrize("index", range(len(CROSSINGS)), ids=[f"{a}_to_{b}" for a, b in CROSSINGS])
def test_it_goes_on_in_another_layout(index: int, everything: tuple) -> None:  # type: ignore[type-arg]
    is_same, difference = everything[2][index]
    assert is_same
    assert difference < 1e-5


@pytest.mark.parametrize("which", ["current", "ema"])
def test_checkpoints_of_different_layouts_have_a_mean(
    which: Weights,
    everything: tuple,
    tmp_path: Path,  # type: ignore[type-arg]
) -> None:
    checkpoints = [everything[5] / str(place) / "checkpoints" / f"step-{N_STEPS:08d}" for place in PLACES]
    out = write_average(checkpoints, tmp_path / "mean", which)
    whole = [load_weights(path, which) for path in checkpoints]
    expected = {name: sum(each[name].double() for each in whole) / len(whole) for name in whole[0]}
    found = load_weights(out)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value.float()) for name, value in expected.items())


def test_it_may_be_switched_on_and_off(everything: tuple) -> None:  # type: ignore[type-arg]
    assert everything[3] == (False, True, False)


def test_a_rank_has_its_part_of_it_only(everything: tuple) -> None:  # type: ignore[type-arg]
    n_parameters = sum(value.numel() for value in everything[0].plain.values())
    for found in everything[4]:
        # ZeRO 3 over two ranks pads each parameter to an even number of elements.
        assert 2 * n_parameters <= found.n_bytes <= 2 * n_parameters * 1.02
