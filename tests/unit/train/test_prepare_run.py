"""The vocabulary comes from the data; initial weights from a checkpoint of the same model only."""

import json
import platform
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dist_transformer.checkpoints.folder import FORMAT, checkpoints_dir
from dist_transformer.checkpoints.pieces import whole
from dist_transformer.checkpoints.publish import partial_folder, publish
from dist_transformer.checkpoints.safe_files import Entry, write_safetensors
from dist_transformer.config import Config, build_config
from dist_transformer.config.layout import with_vocabulary
from dist_transformer.errors import CheckpointError, ConfigError
from dist_transformer.model import build_model, initialize
from dist_transformer.tracking.exits import ATTEMPT_NAME
from dist_transformer.train import prepare_run
from dist_transformer.train.prepare_run import _check_free, initial_weights

SMALL = {"d_model": 16, "d_ff": 24, "n_heads": 2, "n_encoder_layers": 1, "n_decoder_layers": 1}


def config_of(model: dict[str, Any], **train: Any) -> Config:
    return build_config(
        {
            "run": {"dir": "x"},
            "data": {"train": "x"},
            "train": {"steps": 1, **train},
            "model": {**SMALL, **model},
        }
    )


@pytest.mark.parametrize(
    ("model", "n_tokens", "size"),
    [
        ({}, 1, 64),
        ({}, 64, 64),
        ({}, 65, 128),
        ({"pad_vocab_to": 1}, 65, 65),
        ({"pad_vocab_to": 100}, 401, 500),
        ({"vocab_size": 700}, 700, 700),
        ({"vocab_size": 700}, 65, 700),
    ],
)
def test_vocabulary(model: dict[str, Any], n_tokens: int, size: int) -> None:
    config = config_of(model)
    resolved = with_vocabulary(config, n_tokens)
    assert resolved.model.vocab_size == size
    assert resolved.model.model_copy(update={"vocab_size": config.model.vocab_size}) == config.model
    assert with_vocabulary(resolved, n_tokens) == resolved


def test_a_vocabulary_that_is_too_small() -> None:
    with pytest.raises(ConfigError) as caught:
        with_vocabulary(config_of({"vocab_size": 64}), 65)
    assert "model.vocab_size=64 is smaller than the tokenizer's 65 tokens: set it to null, or to 65" in str(
        caught.value
    )


def checkpoint_of(config: Config, folder: Path) -> dict[str, torch.Tensor]:
    """A checkpoint of one rank, without an engine: weights alone, one behind the other in one file."""
    model = build_model(config.model)
    initialize(model, 5, torch.device("cpu"))
    partial = partial_folder(checkpoints_dir(folder), 1)
    partial.mkdir(parents=True)
    weights = {name: value.detach() for name, value in model.named_parameters()}
    n_elements = sum(value.numel() for value in weights.values())
    entry = Entry("master", torch.float32, (n_elements,), list(weights.values()))
    file = "rank-00000.safetensors"
    publish(
        partial,
        {file: write_safetensors(partial / file, [entry], {})},
        {"format": FORMAT, "model": config.model.model_dump(mode="json")},
        {file: [whole(name, tuple(value.shape)).to_json() for name, value in weights.items()]},
        keep=1,
        keep_every=None,
    )
    return weights


def test_initial_weights(tmp_path: Path) -> None:
    expected = checkpoint_of(config_of({"vocab_size": 64}), tmp_path)
    assert initial_weights(config_of({"vocab_size": 64})) is None
    for source in (tmp_path, tmp_path / "checkpoints" / "step-00000001"):
        weights = initial_weights(config_of({"vocab_size": 64, "dropout": 0.4}, init_from=str(source)))
        assert weights is not None
        assert weights.keys() == expected.keys()
        assert all(torch.equal(weights[name], expected[name]) for name in expected)
        # Read when asked for, and not kept: no rank holds the whole model while it is built.
        assert all(weights[name] is not weights[name] for name in expected)


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ({"vocab_size": 128}, "model.vocab_size is 64 there and 128"),
        ({"vocab_size": 64, "d_ff": 32}, "model.d_ff is 24 there and 32"),
        ({"vocab_size": 64, "n_heads": 4}, "model.n_heads is 2 there and 4"),
    ],
)
def test_weights_of_another_model(tmp_path: Path, model: dict[str, Any], says: str) -> None:
    checkpoint_of(config_of({"vocab_size": 64}), tmp_path)
    with pytest.raises(CheckpointError, match=says) as caught:
        initial_weights(config_of(model, init_from=str(tmp_path)))
    assert "train.init_from" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_run_that_is_being_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    program = "import time; time.sleep(100)"
    for name, refused in (("dist_transformer", True), ("another_program", False)):
        process = subprocess.Popen([sys.executable, "-c", program, name])
        try:
            while not Path(f"/proc/{process.pid}/cmdline").read_bytes():
                time.sleep(0.01)
            attempt = {"host": platform.node(), "pid": process.pid}
            (tmp_path / ATTEMPT_NAME).write_text(json.dumps(attempt))
            if refused:
                with pytest.raises(ConfigError, match=f"is being trained by process {process.pid}: wait"):
                    _check_free(tmp_path)
            else:
                _check_free(tmp_path)
        finally:
            process.kill()
            process.wait()
        _check_free(tmp_path)


def test_a_changed_configuration_is_kept_beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tmp_path / "tokenizer"
    tokenizer.write_text("{}")
    monkeypatch.setattr(prepare_run, "load_manifest", lambda *_: SimpleNamespace(tokenizer_path=tokenizer))
    for steps, start in ((1, 0), (2, 1), (3, 1), (3, 2)):
        prepare_run._keep_inputs(config_of({}, steps=steps), tmp_path, start)
    assert "steps: 3" in (tmp_path / "config.yaml").read_text()
    # Of the two that were to go on from step 1, the first trained nothing.
    assert "steps: 1" in (tmp_path / "config.until-step-00000001.yaml").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.until-step-00000001.yaml", "config.yaml", "tokenizer", "tokenizer.json",
    ]  # fmt: skip


def test_no_weights_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"train\.init_from: .*nothing: neither a checkpoint nor a run"):
        initial_weights(config_of({"vocab_size": 64}, init_from=str(tmp_path / "nothing")))
