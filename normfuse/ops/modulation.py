"""Modulation: value * (scale + offset) + shift, and where eager rounds in it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from normfuse.ops.rounding import Types


@dataclass(frozen=True)
class Modulation(Types):
    """The rounding steps of one modulation, in the order in which eager takes them.

        factor = scale.to(factor) + offset
        total  = value.to(product) * factor.to(product)
        result = (total.to(sum) + shift.to(sum)).to(out)

    Attributes:
        factor: type in which the offset is added to the scale.
        product: type of the product.
        sum: type of the sum; that of the product where nothing is added.
        out: type of the result.
    """

    factor: torch.dtype
    product: torch.dtype
    sum: torch.dtype
    out: torch.dtype

    @classmethod
    def once(cls, out: torch.dtype) -> Modulation:
        """One rounding, at the end."""
        wide = torch.promote_types(out, torch.float32)
        return cls(wide, wide, wide, out)


def modulated(
    value: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor | None,
    offset: float,
    types: Modulation,
) -> torch.Tensor:
    """The meaning: value (..., N), scale and shift that broadcast to it -> (..., N) in `out`."""
    factor = modulating(scale, offset, types.factor)
    value = value.to(types.product) * factor.to(types.product)
    if shift is not None:
        value = value.to(types.sum) + shift.to(types.sum)
    return value.to(types.out)


def modulating(scale: torch.Tensor, offset: float, dtype: torch.dtype) -> torch.Tensor:
    """scale + offset in `dtype`."""
    scale = scale.to(dtype)
    return scale + offset if offset else scale
