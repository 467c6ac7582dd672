"""Exported models are the same in Hugging Face's classes, and come back bit for bit; theirs are the same here."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForSeq2SeqLM,
    BartConfig,
    BartForConditionalGeneration,
    MarianConfig,
    MarianMTModel,
    MT5Config,
    MT5ForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)

from dist_transformer.config import GenerateConfig
from dist_transformer.errors import CheckpointError, ConfigError
from dist_transformer.generate.search import beam_search
from dist_transformer.interop.huggingface import Decoding, Imported, export_huggingface, read_huggingface
from dist_transformer.model import EncoderDecoder
from tests.unit.interop.cases import (
    FITS,
    N_VOCAB,
    error,
    model_of,
    our_logits,
    sources_and_targets,
    their_logits,
    train_tokenizer,
)

DECODING = Decoding(GenerateConfig(beam_size=3, max_len=7), 40, 40, reads_sentinels=False)


@pytest.mark.parametrize("case", FITS)
def test_there_and_back(case: str, tmp_path: Path) -> None:
    model, tokenizer = model_of(case), train_tokenizer()
    weights = {name: value.detach() for name, value in model.named_parameters()}
    made = export_huggingface(tmp_path, model.config, weights, tokenizer, DECODING)
    theirs, found = AutoModelForSeq2SeqLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(theirs).__name__ == made
    assert not any(found.values()), found
    source, target = sources_and_targets()
    assert error(our_logits(model, source, target), their_logits(theirs.eval(), source, target)) < 1e-4

    tokens = theirs.generate(source, attention_mask=(source != 0).long())[:, 1:]
    options: dict[str, Any] = {"beam_size": 3, "length_penalty": 1.0, "max_len": 7}
    ours = beam_search(model, source, n_vocab=tokenizer.vocab_size, **options)
    assert [row[: len(best[0].tokens)] for row, best in zip(tokens.tolist(), ours, strict=True)] == [
        best[0].tokens for best in ours
    ]

    back = read_huggingface(tmp_path)
    assert back.family == FITS[case][0]
    assert list(back.notes()) == []
    assert back.weights.keys() == weights.keys()
    assert all(torch.equal(back.weights[name], weights[name]) for name in weights)
    for side in ("encoder", "decoder"):
        assert back.model.stack(side) == model.config.stack(side)  # type: ignore[arg-type]
    free = {"preset", "init", "pad_vocab_to", "encoder", "decoder", "d_model", "d_ff", "n_heads", "head_dim"}
    if model.config.positions not in ("learned", "sinusoidal"):
        free |= {"max_positions"}
    if FITS[case][0] == "t5":
        free |= {"attention_dropout", "ffn_dropout"}
    for name in type(model.config).model_fields.keys() - free:
        assert getattr(back.model, name) == getattr(model.config, name), name


@pytest.mark.parametrize(
    ("generate", "expected"),
    [
        ({"stop": "exact", "min_len": 3}, {"num_beams": 5, "early_stopping": "never", "min_new_tokens": 3}),
        ({"stop": "first", "beam_size": 2}, {"num_beams": 2, "early_stopping": True, "max_new_tokens": 40}),
        (
            {"sample": True, "temperature": 0.5, "top_k": 7, "max_len": 9},
            {"do_sample": True, "temperature": 0.5, "top_k": 7, "top_p": 1.0, "max_new_tokens": 9},
        ),
    ],
)
def test_generation(generate: dict[str, Any], expected: dict[str, Any], tmp_path: Path) -> None:
    model = model_of("marian")
    weights = {name: value.detach() for name, value in model.named_parameters()}
    decoding = Decoding(GenerateConfig(**generate), 40, 40, reads_sentinels=False)
    export_huggingface(tmp_path, model.config, weights, train_tokenizer(), decoding)
    theirs: Any = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    found = theirs.generation_config.to_dict()
    assert {name: found[name] for name in expected} == expected
    tokens = theirs.generate(torch.tensor([[5, 6, 1]]))[0, 1:].tolist()
    assert 1 <= len(tokens) <= found["max_new_tokens"]
    assert not {0, *range(train_tokenizer().vocab_size, N_VOCAB)} & set(tokens[: (tokens + [1]).index(1)])


def their_model(kind: str) -> Any:
    """One of Hugging Face's with random weights, and the special ids of its own kind of tokenizer."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": N_VOCAB,
        "d_model": 32,
        "encoder_layers": 1,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 24,
        "decoder_ffn_dim": 40,
        "max_position_embeddings": 32,
        "init_std": 0.2,
    }
    t5 = {
        "vocab_size": N_VOCAB,
        "d_model": 32,
        "d_kv": 6,
        "num_heads": 4,
        "num_layers": 2,
        "d_ff": 24,
        "decoder_start_token_id": 0,
        "feed_forward_proj": "gated-gelu",
    }
    last = N_VOCAB - 1
    if kind == "bart":
        model: Any = BartForConditionalGeneration(BartConfig(**sizes))
    elif kind == "marian":
        special = {"pad_token_id": last, "decoder_start_token_id": last, "eos_token_id": 0}
        model = MarianMTModel(MarianConfig(**sizes, **special, scale_embedding=True))
    elif kind == "mt5":
        model = MT5ForConditionalGeneration(MT5Config(**t5, num_decoder_layers=1))
        model.lm_head.weight = torch.nn.Parameter(torch.randn(N_VOCAB, 32))
    else:
        model = T5ForConditionalGeneration(T5Config(**t5, tie_word_embeddings=False))
        model.lm_head.weight = torch.nn.Parameter(torch.randn(N_VOCAB, 32))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.1 * torch.randn(parameter.shape)
    return model.eval()


def as_ours(imported: Imported) -> EncoderDecoder:
    model = EncoderDecoder(imported.model)
    model.load_state_dict(imported.weights)
    return model.eval()


@pytest.mark.parametrize("kind", ["t5", "mt5", "marian", "bart"])
def test_a_model_of_theirs(kind: str, tmp_path: Path) -> None:
    """Also where its ids of padding and end of sequence, and what its decoder starts with, are others."""
    theirs = their_model(kind)
    theirs.save_pretrained(tmp_path)
    imported = read_huggingface(tmp_path)
    source, target = sources_and_targets()
    order = torch.tensor(imported.order)
    their_target = order[target]
    their_target[:, 0] = theirs.config.decoder_start_token_id
    expected = their_logits(theirs, order[source], their_target, pad=theirs.config.pad_token_id)
    assert error(our_logits(as_ours(imported), source, target), expected[..., order]) < 1e-4
    notes = " ".join(imported.notes())
    assert ("renumbered" in notes) == (kind in ("marian", "bart"))
    assert ("decoder started with id 2" in notes) == (kind == "bart")
    assert imported.model.tie_embeddings == {"marian": "all"}.get(kind, "inputs")


def test_weights_in_torch_format(tmp_path: Path) -> None:
    theirs = their_model("t5")
    theirs.save_pretrained(tmp_path / "a")
    theirs.config.save_pretrained(tmp_path / "b")
    torch.save(theirs.state_dict(), tmp_path / "b" / "pytorch_model.bin")
    first, second = read_huggingface(tmp_path / "a"), read_huggingface(tmp_path / "b")
    assert all(torch.equal(first.weights[name], second.weights[name]) for name in first.weights)


def test_what_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json cannot be read"):
        read_huggingface(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="names no model_type"):
        read_huggingface(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "umt5"}')
    with pytest.raises(ConfigError, match="model_type umt5 cannot be imported: there are mt5, t5, marian"):
        read_huggingface(tmp_path)
    their_model("t5").config.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="cannot be read by transformers"):
        read_huggingface(tmp_path)


def test_an_output_bias_is_refused(tmp_path: Path) -> None:
    theirs = their_model("marian")
    theirs.final_logits_bias[0, 5] = 1.0
    theirs.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="final_logits_bias is not zero"):
        read_huggingface(tmp_path)


def test_missing_weights(tmp_path: Path) -> None:
    theirs = their_model("bart")
    state = {name: value for name, value in theirs.state_dict().items() if "encoder.layers.0.fc1" not in name}
    theirs.config.save_pretrained(tmp_path)
    torch.save(state, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"no model\.encoder\.layers\.0\.fc1"):
        read_huggingface(tmp_path)
