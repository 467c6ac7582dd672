"""What encoder and decoder share: their input, Add & Norm, and the position-wise feed-forward network."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from dist_transformer.config import ModelConfig, StackConfig
from dist_transformer.model.dropout import add_dropped, dropout
from dist_transformer.model.positions import LearnedPositions, sinusoid_table

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
}
_GATED = {"reglu": "relu", "geglu": "gelu", "geglu_tanh": "gelu_tanh", "swiglu": "silu"}


def build_norm(model: ModelConfig, d_model: int) -> nn.Module:
    """Layer normalisation (Ba et al. 2016) or root-mean-square normalisation (Zhang and Sennrich 2019)."""
    norm = nn.LayerNorm if model.norm == "layer_norm" else nn.RMSNorm
    return norm(d_model, eps=model.norm_eps)


class StackInput(nn.Module):
    """What enters a stack: embedded tokens with their positions, where those are added (the paper, section 3.5).

    Each stack has a table of its own where positions are learned. With `norm_embeddings` the sum is normalised, as in
    BART.
    """

    def __init__(self, model: ModelConfig, stack: StackConfig) -> None:
        super().__init__()
        self.positions, self.dropout = model.positions, stack.dropout
        self.learned = (
            LearnedPositions(model.max_positions, stack.d_model) if model.positions == "learned" else None
        )
        self.norm = build_norm(model, stack.d_model) if model.norm_embeddings else None

    def forward(self, x_BTD: Tensor, positions_BT: Tensor, length: int) -> Tensor:
        """Embedded tokens [B, T, D] at positions below `length` to the first layer's input [B, T, D]."""
        if self.learned is not None:
            x_BTD = x_BTD + self.learned(positions_BT)
        elif self.positions == "sinusoidal":
            table = sinusoid_table(length, x_BTD.shape[-1], x_BTD.device)
            x_BTD = x_BTD + F.embedding(positions_BT, table.to(x_BTD.dtype))
        if self.norm is not None:
            x_BTD = self.norm(x_BTD)
        return dropout(x_BTD, self.dropout, self.training)


class Project(nn.Module):
    """Several linear maps of one input. A module of its own, so that a sharded model can bring the input in once."""

    def forward(self, x_BTD: Tensor, *maps: nn.Module) -> tuple[Tensor, ...]:
        """[B, T, D] to each map's [B, T, ...]."""
        return tuple(map_(x_BTD) for map_ in maps)


class AddNorm(nn.Module):
    """The residual connection around a sublayer with its norm ("Add & Norm", the paper, section 3.1).

    Post: LayerNorm(x + Sublayer(x)), as in the paper. Pre: x + Sublayer(Norm(x)), as in T5.
    """

    def __init__(self, model: ModelConfig, stack: StackConfig) -> None:
        super().__init__()
        self.pre, self.dropout = model.norm_position == "pre", stack.dropout
        self.norm = build_norm(model, stack.d_model)

    def forward(self, x_BTD: Tensor, sublayer: Callable[[Tensor], Tensor]) -> Tensor:
        """Apply `sublayer` to [B, T, D] with dropout on its output, add, normalise."""
        y_BTD = sublayer(self.norm(x_BTD) if self.pre else x_BTD)
        sum_BTD = add_dropped(x_BTD, y_BTD, self.dropout, self.training)
        return sum_BTD if self.pre else self.norm(sum_BTD)


class FeedForward(nn.Module):
    """FFN(x) = activation(x W_1 + b_1) W_2 + b_2 (the paper, section 3.3).

    Gated (Shazeer 2020): (activation(x W_gate) * x W_up) W_down.
    """

    def __init__(self, model: ModelConfig, stack: StackConfig) -> None:
        super().__init__()
        self.activation = _ACTIVATIONS[_GATED.get(model.ffn, model.ffn)]
        self.dropout = model.dropout if model.ffn_dropout is None else model.ffn_dropout
        self.up = nn.Linear(stack.d_model, stack.d_ff, bias=model.bias)
        self.gate = nn.Linear(stack.d_model, stack.d_ff, bias=model.bias) if model.ffn in _GATED else None
        self.down = nn.Linear(stack.d_ff, stack.d_model, bias=model.bias)
        self.project = Project()

    def forward(self, x_BTD: Tensor) -> Tensor:
        """[B, T, D] to [B, T, D], each position by itself."""
        if self.gate is None:
            (up_BTF,) = self.project(x_BTD, self.up)
            inner_BTF = self.activation(up_BTF)
        else:
            gate_BTF, up_BTF = self.project(x_BTD, self.gate, self.up)
            inner_BTF = self.activation(gate_BTF) * up_BTF
        out_BTD: Tensor = self.down(dropout(inner_BTF, self.dropout, self.training))
        return out_BTD
