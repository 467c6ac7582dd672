"""Compiled layers give the step that plain ones give, and are compiled once."""

import pytest
from torch._dynamo import config as dynamo
from torch._dynamo.utils import counters

from dist_transformer.engine.engine import Engine
from dist_transformer.errors import ConfigError
from dist_transformer.model import build_model
from dist_transformer.parallel import compile as compile_module
from dist_transformer.parallel.compile import compile_layers, missing_tool
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


@pytest.mark.skipif(missing_tool() is not None, reason=f"torch.compile needs {missing_tool()}")
def test_compiled_layers_give_the_same_step() -> None:
    [(plain, compiled, n_programs)] = run_ranks(1, both, limit_s=280)
    compare(compiled, plain, COMPILED)
    assert n_programs == 4, "each stack, in training and in evaluation"


def test_a_machine_without_a_compiler_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile_module.shutil, "which", lambda name: None)
    with pytest.raises(
        ConfigError, match=r"train.compile needs a C\+\+ compiler \(g\+\+\), which this machine"
    ):
        compile_layers(build_model(config_of(PRESET, COMPILED, 8).model))
