"""Small models trained for a second: unlike those of random weights, their outputs end and have rivals."""

import copy
from functools import cache

import torch

from dist_transformer.data.token_ids import EOS_ID
from dist_transformer.model import EncoderDecoder, build_model, initialize
from dist_transformer.parallel.cross_entropy import linear_cross_entropy
from tests.unit.model.small import VOCAB, hidden_states, small_config


def trained_model(kind: str) -> EncoderDecoder:
    """A model of its own that mostly repeats its source, leaving out a fifth of the tokens at random."""
    return copy.deepcopy(_train(kind))


@cache
def _train(kind: str) -> EncoderDecoder:
    torch.manual_seed(0)
    # fan-in weights for all: the presets' own are for deep and wide models
    model = build_model(small_config(kind, init="xavier"))
    initialize(model, seed=5, device=torch.device("cpu"))
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(120):
        packs = []
        for length in torch.randint(1, 10, (32,)).tolist():
            source = torch.randint(2, VOCAB, (length,))
            target = source[torch.rand(length) < 0.8]
            packs.append([([*source.tolist(), EOS_ID], [*target.tolist(), EOS_ID])])
        hidden, targets = hidden_states(model, packs)
        loss = linear_cross_entropy(hidden, model.output_weight, targets, ignore_id=0)
        optimizer.zero_grad()
        (loss.objective / loss.n_tokens).backward()
        optimizer.step()
    return model.eval()
