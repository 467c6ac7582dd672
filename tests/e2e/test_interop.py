"""By the public commands: runs leave for Hugging Face and CTranslate2 and come back, and models of theirs train on."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ctranslate2
import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, BartConfig, BartForConditionalGeneration

from dist_transformer.checkpoints.folder import latest_checkpoint
from dist_transformer.checkpoints.reader import load_weights
from dist_transformer.cli import main
from tests.e2e.conftest import command, launch

WriteConfig = Callable[..., Path]

SMALL = {
    "d_model": 32,
    "d_ff": 64,
    "n_heads": 2,
    "n_kv_heads": None,
    "head_dim": 16,
    "n_encoder_layers": 1,
    "n_decoder_layers": 2,
    "dropout": 0.0,
}
N_LINES = 200


@pytest.fixture(scope="module", params=["t5_v1_1_small", "vaswani2017_base"])
def run_dir(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    pair_shards: Path,
    module_config: WriteConfig,
) -> Path:
    """A run of two tensor-parallel ranks, and one whose weights ZeRO 3 shards over two."""
    is_t5 = request.param.startswith("t5")
    folder = tmp_path_factory.mktemp("runs") / "run"
    config = module_config(
        pair_shards,
        run={"dir": str(folder)},
        model={"preset": request.param, **SMALL},
        data={"workers": 0, "eval": None},
        train={"steps": 40},
        optimizer={"lr": 0.01},
        parallel={"tp_degree": 2 if is_t5 else 1, "zero_stage": 1 if is_t5 else 3},
        checkpoint={"every": 40},
        generate={"beam_size": 5, "max_len": 40},
    )
    done = launch(config, "--nproc", 2)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def run(*arguments: object) -> None:
    """A command, in this process."""
    assert main([str(argument) for argument in arguments]) == 0


def test_there_used_and_back(run_dir: Path, pair_files: Path, tmp_path: Path) -> None:
    lines = (pair_files / "source.txt").read_text().splitlines()[:N_LINES]
    (tmp_path / "lines").write_text("\n".join(lines) + "\n")
    for name, options in (("beam", ()), ("greedy", ("--beam-size", 1))):
        run(
            "generate",
            run_dir,
            "--input",
            tmp_path / "lines",
            "--output",
            tmp_path / name,
            "--threads",
            1,
            *options,
        )
    beam, greedy = ((tmp_path / name).read_text().splitlines() for name in ("beam", "greedy"))
    assert len(set(beam)) > N_LINES / 2

    run("export", run_dir, tmp_path / "theirs", "--to", "huggingface")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "theirs")
    theirs: Any = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "theirs")
    outputs = theirs.generate(**tokenizer(lines, padding=True, return_tensors="pt"))
    assert tokenizer.batch_decode(outputs, skip_special_tokens=True) == beam

    run("export", run_dir, tmp_path / "fast", "--to", "ctranslate2")
    translator = ctranslate2.Translator(str(tmp_path / "fast"), device="cpu", intra_threads=1)
    sources = [tokenizer.convert_ids_to_tokens(ids) for ids in tokenizer(lines).input_ids]
    found = translator.translate_batch(sources, beam_size=1, max_decoding_length=40, min_decoding_length=0)
    texts = [
        tokenizer.decode(tokenizer.convert_tokens_to_ids(result.hypotheses[0]), skip_special_tokens=True)
        for result in found
    ]
    assert sum(a == b for a, b in zip(texts, greedy, strict=True)) >= 0.99 * N_LINES

    run("import", tmp_path / "theirs", tmp_path / "back")
    weights, back = newest_weights(run_dir), newest_weights(tmp_path / "back")
    assert weights.keys() == back.keys()
    assert all(torch.equal(weights[name], back[name]) for name in weights)
    run(
        "generate",
        tmp_path / "back",
        "--input",
        tmp_path / "lines",
        "--output",
        tmp_path / "again",
        "--threads",
        1,
    )
    assert (tmp_path / "again").read_text().splitlines() == beam

    run("export", run_dir, tmp_path / "plain", "--to", "safetensors")
    assert {path.name for path in (tmp_path / "plain").iterdir()} == {
        "model.safetensors",
        "config.json",
        "dist_transformer.json",
        "tokenizer.json",
    }


def newest_weights(run_dir: Path) -> dict[str, torch.Tensor]:
    checkpoint = latest_checkpoint(run_dir)
    assert checkpoint is not None
    return load_weights(checkpoint)


def test_a_random_model_of_theirs_trains_on(tmp_path: Path, pair_shards: Path) -> None:
    """BART with its own special ids; the tokenizer is given, as the folder has none."""
    torch.manual_seed(0)
    config = BartConfig(
        vocab_size=448,
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        max_position_embeddings=64,
    )
    BartForConditionalGeneration(config).save_pretrained(tmp_path / "bart")
    run("import", tmp_path / "bart", tmp_path / "run", "--tokenizer", pair_shards / "tokenizer.json")
    done = command(
        "train", tmp_path / "run" / "config.yaml", f"run.dir={tmp_path / 'tuned'}", f"data.train={pair_shards}",
        "train.steps=10", "train.global_batch_size=8", "train.micro_batch_size=8", "train.precision=fp32",
        "data.max_source_len=64", "data.max_target_len=64", "data.window=64", "data.workers=0",
        "optimizer.lr=0.01", "optimizer.warmup_steps=2", "tracking.every=1", "tracking.wandb.mode=disabled",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in (tmp_path / "tuned" / "metrics.jsonl").read_text().splitlines()]
    losses = [row["train/loss"] for row in rows if row["event"] == "train"]
    assert losses[-1] < losses[0] - 0.5
    run("export", tmp_path / "tuned", tmp_path / "again", "--family", "bart")
    again: Any = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "again")
    assert type(again).__name__ == "BartForConditionalGeneration"
    before, after = newest_weights(tmp_path / "run"), newest_weights(tmp_path / "tuned")
    name = "encoder.input.learned.weight"
    assert not torch.equal(before[name], after[name])
    assert torch.equal(again.state_dict()["model.encoder.embed_positions.weight"][2:], after[name])


def test_bad_input(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*arguments: object) -> str:
        assert main([str(argument) for argument in arguments]) != 0
        return capsys.readouterr().err.strip().removeprefix("dist-transformer: ")

    there = tmp_path / "there"
    there.mkdir()
    assert refused("export", run_dir, there) == f"{there} is there already: give another OUT, or --overwrite"
    (there / "thesis.tex").write_text("")
    assert "holds thesis.tex, which no export wrote" in refused("export", run_dir, there, "--overwrite")
    assert refused("import", there, there) == f"{there} is there already: give another OUT, or --overwrite"
    assert "which no import wrote: it is not overwritten" in refused("import", there, run_dir, "--overwrite")
    out = tmp_path / "out"
    assert "this model is no bart of Hugging Face's" in refused("export", run_dir, out, "--family", "bart")
    assert "--quantization is for --to ctranslate2" in refused(
        "export", run_dir, out, "--quantization", "int8"
    )
    assert refused("export", there, out) == f"{there}: no run there: config.yaml is missing"
    assert "config.json cannot be read" in refused("import", there, out)
    for package, target in (("transformers", "huggingface"), ("ctranslate2", "ctranslate2")):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, None)  # what `import` finds where it is not installed
            said = refused("export", run_dir, out, "--to", target)
        assert said == f"{package} is not installed: pip install 'dist_transformer[interop]'"
    with pytest.raises(SystemExit) as ended:
        main(["export", str(run_dir), str(out), "--family", "bloom"])
    assert ended.value.code == 2
    assert not out.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["there"]
