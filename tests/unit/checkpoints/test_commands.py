"""`dist-transformer checkpoint list|verify|convert`: what a person reads of a run's checkpoints."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dist_transformer.cli import main
from tests.unit.engine.published import fake_engine, save


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    engine = fake_engine(tmp_path / "run", keep=9)
    for step in (10, 20, 30):
        save(engine, step)
    return tmp_path / "run"


def spoil(run_dir: Path, step: int) -> Path:
    """Another byte in the middle: only a checksum sees it."""
    file = run_dir / "checkpoints" / f"step-{step:08d}" / "rank-00000.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 255
    file.write_bytes(content)
    return file


def test_list(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run_dir / "checkpoints" / "step-00000040.partial").mkdir()
    short = run_dir / "checkpoints" / "step-00000010" / "index.json"
    short.write_text(short.read_text()[:-5])
    assert main(["checkpoint", "list", str(run_dir)]) == 0
    headings, first, second, third, partial = capsys.readouterr().out.splitlines()
    assert headings.split() == ["checkpoint", "saved", "size", "layout", "tokens", "state"]
    assert first.startswith("step-00000010")
    assert "damaged" in first
    assert f"{short} has" in first
    assert second.endswith("200     complete")
    assert "dp 1 x tp 1, ZeRO 0, fp32" in second
    assert third.endswith("complete, latest")
    assert "step-00000040.partial" in partial
    assert "not complete" in partial


def test_list_needs_no_torch(run_dir: Path) -> None:
    code = (
        f"import sys; from dist_transformer.cli import main; main(['checkpoint', 'list', {str(run_dir)!r}]);"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"


def test_verify(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", "verify", str(run_dir)]) == 0
    assert capsys.readouterr().out.startswith(f"{run_dir / 'checkpoints' / 'step-00000030'}: 3 files are as")
    file = spoil(run_dir, 20)
    assert main(["checkpoint", "verify", str(run_dir)]) == 0
    capsys.readouterr()
    assert main(["checkpoint", "verify", str(file.parent)]) == 1
    said = capsys.readouterr()
    assert said.out.splitlines() == [f"{file} is not what was written: its sha256 differs"]
    assert "1 of 1 checkpoints are damaged" in said.err
    (run_dir / "checkpoints" / "step-00000010" / "files.json").write_text("[]")
    assert main(["checkpoint", "verify", str(run_dir), "--all"]) == 1
    said = capsys.readouterr()
    assert "step-00000010/files.json: cannot be read" in said.out
    assert "step-00000030: 3 files are as they were written" in said.out
    assert "2 of 3 checkpoints are damaged" in said.err


@pytest.mark.parametrize("format_", ["safetensors", "torch"])
def test_convert(run_dir: Path, tmp_path: Path, format_: str, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "weights.bin"
    arguments = ["checkpoint", "convert", str(run_dir), "--format", format_, "--out", str(out)]
    assert main(arguments) == 0
    assert "250 parameters" in capsys.readouterr().out
    weights = load_file(out) if format_ == "safetensors" else torch.load(out, weights_only=True)
    assert torch.equal(weights["weight"], torch.full((10, 24), 30.0))
    assert torch.equal(weights["bias"], torch.full((10,), 31.0))
    assert json.loads((tmp_path / "new" / "weights.json").read_text())["model"]["vocab_size"] == 64
    assert sorted(file.name for file in out.parent.iterdir()) == ["weights.bin", "weights.json"]
    assert main(arguments) == 1
    assert "is there already: give another --out, or --overwrite" in capsys.readouterr().err
    assert main([*arguments, "--overwrite"]) == 0


@pytest.mark.parametrize("action", [["list"], ["verify"], ["verify", "--all"], ["convert", "--out", "x.bin"]])
def test_no_run_there(tmp_path: Path, action: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", *action[:1], str(tmp_path / "none"), *action[1:]]) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert "none: " in line
