"""Checkpoints that are damaged, gone, of another model or another version: what is refused and with which words.

What a run may change between one start and the next is accepted.
"""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from dist_transformer.checkpoints import folder as folder_module
from dist_transformer.checkpoints.folder import (
    checkpoints_dir,
    damages,
    latest_checkpoint,
    list_checkpoints,
    read_trainer_state,
)
from dist_transformer.config import build_config
from dist_transformer.engine.checkpoint import check_checkpoint
from dist_transformer.engine.engine import Engine
from dist_transformer.errors import CheckpointError
from dist_transformer.parallel.mesh import Mesh
from tests.unit.engine.published import fake_engine, save


def damaged(path: Path, engine: Engine) -> str:
    """The one line with which a checkpoint is refused."""
    with pytest.raises(CheckpointError) as caught:
        check_checkpoint(path, engine.config, engine.mesh)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def test_damaged_files_are_found(tmp_path: Path) -> None:
    engine = fake_engine(tmp_path, keep=9)
    for step in range(1, 6):
        save(engine, step)
    first, second, third, fourth, fifth = list_checkpoints(tmp_path)
    tensors = "rank-00000.safetensors"
    (first / tensors).write_bytes((first / tensors).read_bytes()[:-1])
    assert f"{tensors} has" in damaged(first, engine)
    assert "to one of step-00000002, step-00000003" in damaged(first, engine)
    (second / tensors).unlink()
    assert f"{tensors} is missing: the checkpoint is damaged" in damaged(second, engine)
    (third / "files.json").write_text("{")
    assert "files.json: cannot be read" in damaged(third, engine)
    (fourth / "index.json").unlink()
    assert "index.json is missing" in damaged(fourth, engine)
    content = bytearray((fifth / tensors).read_bytes())
    content[-7] ^= 1
    (fifth / tensors).write_bytes(content)
    check_checkpoint(fifth, engine.config, engine.mesh)
    [found] = damages(fifth, checksums=True)
    assert f"{tensors} is not what was written: its sha256 differs" in found
    assert f"{tensors} is not what was written" in damaged(fifth, fake_engine(tmp_path, verify="sha256"))


def test_a_pointer_to_nothing(tmp_path: Path) -> None:
    engine = fake_engine(tmp_path)
    save(engine, 1)
    pointer = checkpoints_dir(tmp_path) / "latest"
    pointer.write_text("step-00000009\n")
    with pytest.raises(
        CheckpointError, match="names 'step-00000009', which is not there: write one of step-00000001"
    ):
        latest_checkpoint(tmp_path)
    shutil.rmtree(checkpoints_dir(tmp_path) / "step-00000001")
    with pytest.raises(CheckpointError, match="remove it to start from step 0"):
        latest_checkpoint(tmp_path)
    pointer.write_text("")
    with pytest.raises(CheckpointError, match="remove it to start from step 0"):
        latest_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("section", "fields", "says"),
    [
        ("model", {"d_ff": 96}, "model.d_ff is 2048 there and 96 in this configuration"),
        ("model", {"n_decoder_layers": 3}, "model.n_decoder_layers is 6 there and 3"),
        ("model", {"vocab_size": 128}, "model.vocab_size is 64 there and 128"),
        ("model", {"decoder": {"n_heads": 4}}, "model.decoder.n_heads is 8 there and 4"),
        ("model", {"encoder": {"n_kv_heads": 2}}, "model.encoder.n_kv_heads is 8 there and 2"),
    ],
)  # fmt: skip
def test_another_model(tmp_path: Path, section: str, fields: dict[str, Any], says: str) -> None:
    engine = fake_engine(tmp_path)
    path = save(engine, 1)
    tree = engine.config.model_dump(mode="json")
    tree[section].update(fields)
    with pytest.raises(CheckpointError) as caught:
        check_checkpoint(path, build_config(tree), engine.mesh)
    assert says in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    "fields",
    [
        {"dropout": 0.3},
        {"attention_dropout": 0.2},
        {"encoder": {"dropout": 0.0}},
        {"init": "t5"},
        {"head_dim": 64, "n_kv_heads": 8},
    ],
)
def test_what_is_no_part_of_the_weights_may_change(tmp_path: Path, fields: dict[str, Any]) -> None:
    engine = fake_engine(tmp_path)
    path = save(engine, 1)
    tree = engine.config.model_dump(mode="json")
    tree["model"].update(fields)
    check_checkpoint(path, build_config(tree), engine.mesh)


@pytest.mark.parametrize(
    ("section", "fields"), [("parallel", {"zero_stage": 3}), ("train", {"precision": "bf16"})]
)
def test_another_layout_is_welcome(tmp_path: Path, section: str, fields: dict[str, Any]) -> None:
    engine = fake_engine(tmp_path)
    path = save(engine, 1)
    tree = engine.config.model_dump(mode="json")
    tree[section].update(fields)
    mesh = cast("Mesh", SimpleNamespace(dp_size=4, tp_size=2, rank=0, world_size=1))
    check_checkpoint(path, build_config(tree), mesh)


def test_another_format_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = fake_engine(tmp_path)
    path = save(engine, 1)
    monkeypatch.setattr(folder_module, "FORMAT", 99)
    with pytest.raises(
        CheckpointError, match=r"written in checkpoint format 2 by .* reads format 99: go on with"
    ):
        read_trainer_state(path)
    (path / "trainer.json").write_text(json.dumps([1]))
    with pytest.raises(CheckpointError):
        read_trainer_state(path)


@pytest.mark.parametrize("state", [{"step": 3, "unheard_of": 1}, [], None])
def test_a_state_of_another_version_is_one_sentence(tmp_path: Path, state: object) -> None:
    description = {"format": 2, "versions": {"dist_transformer": "0.0.9"}, "state": state}
    (tmp_path / "trainer.json").write_text(json.dumps(description))
    with pytest.raises(CheckpointError, match=r"trainer\.json: its state is another version's \(0\.0\.9"):
        read_trainer_state(tmp_path)
