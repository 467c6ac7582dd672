"""Dropout and attention on a CPU: torch's own beside ours, forward and backward, by size and precision.

    OMP_NUM_THREADS=1 .venv/bin/python -m benchmarks.kernels [--repeats 20]

CPU milliseconds of the fastest of `--repeats` calls, taken in turn. Attention is over packed rows: samples of 15
positions, each of which sees its own.
"""

import argparse
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from dist_transformer.engine.allocator import keep_freed_memory
from dist_transformer.model.attention import _attend_by_products, may_attend, scores_mask
from dist_transformer.model.dropout import dropout

SAMPLE_LEN = 15
SIZES = ((16, 4, 64, 64), (16, 4, 128, 32), (16, 4, 128, 64), (4, 8, 256, 64), (2, 8, 512, 64))
"""Rows, heads, positions, width of a head."""
DTYPES = (torch.float32, torch.bfloat16)


def fastest(
    functions: dict[str, Callable[[], Tensor]], leaves: list[Tensor], repeats: int
) -> dict[str, float]:
    """CPU milliseconds of each function with its backward pass."""
    best = dict.fromkeys(functions, float("inf"))
    for _ in range(repeats):
        for name, function in functions.items():
            began = time.process_time()
            out = function()
            out.backward(out.detach())
            best[name] = min(best[name], 1e3 * (time.process_time() - began))
            for leaf in leaves:
                leaf.grad = None
    return best


def row(title: str, best: dict[str, float]) -> None:
    """One line of a table."""
    print(f"| {title} | " + " | ".join(f"{ms:.2f}" for ms in best.values()) + " |", flush=True)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=20)
    options = parser.parse_args()
    torch.manual_seed(0)
    keep_freed_memory()
    print("| dropout of 0.1, [16, 128, 256] | torch | ours |\n|---|---|---|")
    for dtype in DTYPES:
        x = torch.randn(16, 128, 256, dtype=dtype, requires_grad=True)
        functions = {"torch": lambda x=x: F.dropout(x, 0.1), "ours": lambda x=x: dropout(x, 0.1, True)}
        row(str(dtype)[6:], fastest(functions, [x], options.repeats))
    print("\n| attention, [rows, heads, positions, width] | fused kernel | products |\n|---|---|---|")
    for rows, heads, length, width in SIZES:
        segments = (torch.arange(length) // SAMPLE_LEN + 1).expand(rows, length)
        for dtype in DTYPES:
            mask = scores_mask(may_attend(segments, segments), None, dtype)
            qkv = [
                torch.randn(rows, length, heads * width, dtype=dtype)
                .view(rows, length, heads, width)
                .transpose(1, 2)
                for _ in range(3)
            ]
            leaves = [x.detach().requires_grad_() for x in qkv]
            functions = {
                "fused": lambda leaves=leaves, mask=mask: F.scaled_dot_product_attention(
                    *leaves, attn_mask=mask
                ),
                "products": lambda leaves=leaves, mask=mask, width=width: _attend_by_products(
                    *leaves, mask, width**-0.5, 0.0
                ),
            }
            row(
                f"{[rows, heads, length, width]} {str(dtype)[6:]}",
                fastest(functions, leaves, options.repeats),
            )


if __name__ == "__main__":
    main()
