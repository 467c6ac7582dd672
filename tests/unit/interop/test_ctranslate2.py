"""CTranslate2 gives our log-probabilities and our greedy output, for every architecture that it has."""

from pathlib import Path

import ctranslate2
import pytest
import torch

from dist_transformer.errors import ConfigError
from dist_transformer.generate.search import beam_search
from dist_transformer.interop.ctranslate2 import export_ctranslate2, misfit
from dist_transformer.interop.tokenizer import tokens_of
from dist_transformer.model import EncoderDecoder
from tests.unit.interop.cases import N_VOCAB, our_logits, sources_and_targets, train_tokenizer
from tests.unit.model.small import KINDS, small_config, small_model

TOKENIZER = train_tokenizer()
NAMES = tokens_of(TOKENIZER)


def export(model: EncoderDecoder, folder: Path, quantization: str | None = None) -> ctranslate2.Translator:
    weights = {name: value.detach() for name, value in model.named_parameters()}
    export_ctranslate2(folder, model.config, weights, TOKENIZER, 64, quantization)
    return ctranslate2.Translator(str(folder), device="cpu", compute_type="default", intra_threads=1)


FITTING = [kind for kind in KINDS if misfit(small_config(kind)) is None]


def test_what_fits() -> None:
    assert set(KINDS) - set(FITTING) == {
        "modern_small",
        "qk_norm",
        "grouped_query_rotary",
        "widths",
        "widths_rotary_pre",
    }


@pytest.mark.parametrize("kind", FITTING)
def test_same_scores_and_output(kind: str, tmp_path: Path) -> None:
    model = small_model(kind, vocab_size=N_VOCAB)
    with torch.no_grad():  # it may emit padding, we never do
        model.source_embedding.weight[0] *= 0.1
        model.output_weight[0] *= 0.1
    translator = export(model, tmp_path)
    source, target = sources_and_targets()
    texts = [[NAMES[i] for i in row if i] for row in source.tolist()]
    # What is scored is closed with EOS; the decoder's first input is padding.
    closed = torch.cat([target[:, 1:], torch.ones_like(target[:, :1])], dim=1)
    log_p = our_logits(model, source, target)[..., : len(NAMES)].log_softmax(-1)
    expected = log_p.gather(2, closed[..., None]).squeeze(2)
    scored = translator.score_batch(texts, [[NAMES[i] for i in row[1:]] for row in target.tolist()])
    found = torch.tensor([result.log_probs for result in scored])
    assert expected.std() > 0.1
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()

    ours = beam_search(model, source, beam_size=1, length_penalty=1.0, max_len=6, n_vocab=len(NAMES))
    theirs = translator.translate_batch(texts, beam_size=1, max_decoding_length=6, min_decoding_length=0)
    same = [
        [NAMES[i] for i in best[0].tokens] == result.hypotheses[0]
        for best, result in zip(ours, theirs, strict=True)
    ]
    assert all(same)


def test_quantization(tmp_path: Path) -> None:
    model = small_model("t5_v1_1_small", vocab_size=N_VOCAB)
    for name in ("float32", "int8"):
        (tmp_path / name).mkdir()
        export(model, tmp_path / name, name)
    sizes = [(tmp_path / name / "model.bin").stat().st_size for name in ("float32", "int8")]
    assert sizes[1] < 0.5 * sizes[0]
    with pytest.raises(ConfigError, match="--quantization int3: there are int8, "):
        export(model, tmp_path, "int3")


def test_what_it_cannot_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no such architecture: model\.qk_norm is true"):
        export(small_model("modern_small", vocab_size=N_VOCAB), tmp_path)
    with pytest.raises(ConfigError, match="encoder and decoder differ in d_model"):
        export(small_model("widths", vocab_size=N_VOCAB), tmp_path)
