"""Compiled layers give the step that plain ones give, and are compiled once."""

from torch._dynamo import config as dynamo
from torch._dynamo.utils import counters

from dist_transformer.engine.engine import Engine
from tests.dist.harness import Mesh, run_ranks
from tests.dist.test_gradients import Outcome, Split, compare, config_of, outcome, rows_of

PRESET = "modern_small"
PLAIN, COMPILED = (
    Split(zero_stage=2, recompute="full", packed=True, compile=is_compiled) for is_compiled in (False, True)
)


def both(mesh: Mesh) -> tuple[Outcome, Outcome, int]:
    """What a step gives plain and compiled, and how many programs six layers were compiled to."""
    plain, compiled = outcome(mesh, PRESET, PLAIN), outcome(mesh, PRESET, COMPILED)
    engine = Engine(config_of(PRESET, COMPILED, 8, n_encoder_layers=3, n_decoder_layers=3), mesh)
    batch = rows_of(packed=True)
    engine.evaluate_batch(batch)
    n_programs = int(counters["stats"]["unique_graphs"])
    with dynamo.patch(error_on_recompile=True):
        for step in (1, 2, 3):
            engine.train_step([batch], 50, step)
            engine.evaluate_batch(batch)
    assert not counters["graph_break"], dict(counters["graph_break"])
    return plain, compiled, n_programs


def test_compiled_layers_give_the_same_step() -> None:
    [(plain, compiled, n_programs)] = run_ranks(1, both, limit_s=280)
    compare(compiled, plain, COMPILED)
    assert n_programs == 4, "each stack, in training and in evaluation"
