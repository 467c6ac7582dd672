"""Logits equal Hugging Face's own classes on the same random weights, with padding in the batch."""

import pytest
import torch
from transformers import MarianConfig, MarianMTModel, T5Config, T5ForConditionalGeneration

from dist_transformer.config import ModelConfig, build_config
from dist_transformer.interop.huggingface import from_huggingface
from dist_transformer.model import EncoderDecoder

N_ROWS, N_SOURCE, N_TARGET, VOCAB = 3, 37, 23, 1000


def preset(name: str) -> ModelConfig:
    tree = {"run": {"dir": "x"}, "data": {"train": "x"}, "train": {"steps": 1}}
    return build_config({**tree, "model": {"preset": name, "vocab_size": VOCAB}}).model


def huggingface_twin(name: str) -> torch.nn.Module:
    config = preset(name)
    shape = config.stack("encoder")
    if name.startswith("t5"):
        twin = T5ForConditionalGeneration(
            T5Config(
                vocab_size=VOCAB,
                d_model=shape.d_model,
                d_kv=shape.head_dim,
                d_ff=shape.d_ff,
                num_layers=shape.n_layers,
                num_heads=shape.n_heads,
                feed_forward_proj="gated-gelu",
                tie_word_embeddings=False,
            )
        )
        # transformers 5 ties the output projection whatever the configuration says; T5 v1.1 has one of its own.
        twin.lm_head.weight = torch.nn.Parameter(torch.randn_like(twin.lm_head.weight))
        return twin
    return MarianMTModel(
        MarianConfig(
            vocab_size=VOCAB,
            d_model=shape.d_model,
            encoder_layers=shape.n_layers,
            decoder_layers=shape.n_layers,
            encoder_attention_heads=shape.n_heads,
            decoder_attention_heads=shape.n_heads,
            encoder_ffn_dim=shape.d_ff,
            decoder_ffn_dim=shape.d_ff,
            activation_function="relu",
            scale_embedding=True,
            max_position_embeddings=64,
            pad_token_id=0,
            eos_token_id=1,
            decoder_start_token_id=0,
        )
    )


@pytest.mark.parametrize("name", ["t5_v1_1_small", "vaswani2017_base"])
def test_logits_equal_huggingface(name: str) -> None:
    torch.manual_seed(0)
    theirs = huggingface_twin(name).eval()
    ours = EncoderDecoder(preset(name)).eval()
    names = [parameter for parameter, _ in ours.named_parameters()]
    ours.load_state_dict(
        from_huggingface(theirs.state_dict(), names, name.split("_")[0].replace("vaswani2017", "marian"))
    )

    source = torch.randint(2, VOCAB, (N_ROWS, N_SOURCE))
    target = torch.randint(2, VOCAB, (N_ROWS, N_TARGET))
    is_source = torch.arange(N_SOURCE)[None] < torch.tensor([37, 20, 5])[:, None]
    source = source * is_source
    with torch.no_grad():
        expected = theirs(input_ids=source, attention_mask=is_source.long(), decoder_input_ids=target).logits
        segments = is_source.int()
        positions = torch.arange(64).expand(N_ROWS, 64)
        hidden = ours(
            source,
            segments,
            positions[:, :N_SOURCE],
            target,
            torch.ones_like(target),
            positions[:, :N_TARGET],
        )
        actual = ours.logits(hidden)
    assert expected.std() > 0.1  # not trivially equal
    assert (actual - expected).abs().max() < 1e-4
