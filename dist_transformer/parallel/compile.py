"""Compilation: what lies between a layer's matrix products becomes few kernels (Ansel et al. 2024, PyTorch 2)."""

import torch

from dist_transformer.model import EncoderDecoder


def compile_layers(model: EncoderDecoder) -> None:
    """Compile each layer's forward pass, in place, at its first call; parameter names stay as they are.

    Layers of a stack are the same program with other weights, so that a stack is compiled once for training and once
    for evaluation. Decoding, whose shapes change with every token, runs as it is.
    """
    for stack in (model.encoder, model.decoder):
        for layer in stack.layers:
            layer.forward = torch.compile(layer.forward, dynamic=False)
