"""Gates: value * act(gate), with act a silu or a sigmoid, and where eager rounds in it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from normfuse.ops.rounding import Types

# Qwen3-Next, Mamba 2; Kimi Linear; and silu written out, whose sigmoid rounds before the product.
ACTIVATIONS = ("silu", "sigmoid", "x_sigmoid")


@dataclass(frozen=True)
class Gating(Types):
    """The rounding steps of one gate, in the order in which eager takes them.

        factor = act(gate.to(gate)).to(factor)
        result = (value * factor).to(out)              the product formed in `product`

    Attributes:
        gate: type in which the activation is computed.
        factor: type to which the activation is rounded before it multiplies.
        product: type of the product.
        out: type of the result.
    """

    gate: torch.dtype
    factor: torch.dtype
    product: torch.dtype
    out: torch.dtype

    @classmethod
    def once(cls, out: torch.dtype) -> Gating:
        """One rounding, at the end."""
        wide = torch.promote_types(out, torch.float32)
        return cls(wide, wide, wide, out)


def gated(value: torch.Tensor, gate: torch.Tensor, activation: str, types: Gating) -> torch.Tensor:
    """The meaning: value, gate (..., N) -> (..., N) in `types.out`."""
    factor = activated(gate.to(types.gate), activation).to(types.factor)
    if torch.promote_types(value.dtype, factor.dtype) != types.product:
        value = value.to(types.product)
    return (value * factor).to(types.out)


def activated(gate: torch.Tensor, activation: str) -> torch.Tensor:
    """act(gate), in its type."""
    if activation == "silu":
        return F.silu(gate)
    return torch.sigmoid(gate) if activation == "sigmoid" else gate * torch.sigmoid(gate)


def gate_slope(gate: torch.Tensor, activation: str) -> torch.Tensor:
    """act'(gate): with s = sigmoid(gate), s * (1 - s), or s * (1 + gate * (1 - s)) for a silu."""
    sigmoid = torch.sigmoid(gate)
    if activation == "sigmoid":
        return sigmoid * (1 - sigmoid)
    return sigmoid * (1 + gate * (1 - sigmoid))
