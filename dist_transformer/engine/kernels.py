"""Which of torch's kernels may be used on a GPU."""

import torch

from dist_transformer.config import Config

_TILE, _HALF = 128, 64


def choose_kernels(config: Config, device: torch.device) -> None:
    """Keep cuDNN's attention away from lengths at which its gradients may be NaN, for this process.

    With a mask, at lengths that leave 64 of 128, the gradient of queries whose scores are all far below zero is NaN in
    torch 2.11 to 2.13 on H100 and H200 (pytorch issue 196678). Other kernels take its place there.
    """
    if device.type != "cuda":
        return
    data = config.data
    lengths = (data.max_source_len, data.max_target_len)
    # Without packing, rows are as long as their samples are.
    if not data.packing or any(length % _TILE == _HALF for length in lengths):
        torch.backends.cuda.enable_cudnn_sdp(False)
