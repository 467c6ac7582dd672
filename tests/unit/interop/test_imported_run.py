"""How an imported model decodes: its own settings, in our count, and what has no counterpart is named."""

from typing import Any

import pytest

from dist_transformer.interop.imported_run import _generate, left_out

# What `to_dict` gives where nobody set anything.
UNSET = {"max_length": 20, "min_length": 0, "num_beams": 1, "do_sample": False, "early_stopping": False}


@pytest.mark.parametrize(
    ("generation", "expected"),
    [
        ({}, {"beam_size": 1, "stop": "estimate"}),
        ({"max_new_tokens": 16}, {"max_len": 16}),
        # Theirs count the decoder's start.
        ({"max_length": 32, "min_length": 12}, {"max_len": 31, "min_len": 11}),
        ({"max_length": 32, "max_new_tokens": 9, "min_new_tokens": 2}, {"max_len": 9, "min_len": 2}),
        ({"max_length": 4096}, {"max_len": 512}),
        ({"num_beams": 4, "early_stopping": "never"}, {"beam_size": 4, "stop": "exact"}),
        (
            {"do_sample": True, "temperature": 0.7, "top_k": 5, "top_p": 0.9},
            {"sample": True, "temperature": 0.7, "top_k": 5, "top_p": 0.9},
        ),
        ({"temperature": 0.7, "top_k": 50}, {}),
    ],
)
def test_generation(generation: dict[str, Any], expected: dict[str, Any]) -> None:
    found = _generate(UNSET | generation, longest=512)
    assert found == _generate(UNSET, longest=512) | expected


def test_what_is_left_out() -> None:
    assert left_out(UNSET | {"no_repeat_ngram_size": 0, "repetition_penalty": 1.0}) == []
    [sentence] = left_out(UNSET | {"no_repeat_ngram_size": 3, "forced_bos_token_id": 5})
    assert sentence.endswith("forced_bos_token_id, no_repeat_ngram_size")
