"""Kernels that must not be used."""

import pytest
import torch

from dist_transformer.config import build_config
from dist_transformer.engine.kernels import choose_kernels


@pytest.mark.parametrize(
    ("device", "lengths", "packing", "is_kept_away"),
    [
        ("cuda", (512, 114), True, False),
        ("cuda", (512, 64), True, True),
        ("cuda", (192, 128), True, True),
        ("cuda", (512, 128), False, True),
        ("cpu", (64, 64), True, False),
    ],
)
def test_cudnn_is_kept_from_lengths_at_which_it_gives_nan(
    device: str, lengths: tuple[int, int], packing: bool, is_kept_away: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[bool] = []
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", called.append)
    config = build_config(
        {
            "run": {"dir": "unused"},
            "data": {
                "train": "unused", "max_source_len": lengths[0], "max_target_len": lengths[1], "packing": packing
            },
            "train": {"steps": 1},
        }
    )  # fmt: skip
    choose_kernels(config, torch.device(device))
    assert called == ([False] if is_kept_away else [])
