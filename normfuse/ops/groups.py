"""Norms over groups of neighbouring columns: each group is a row, whose weight may be its own."""

from __future__ import annotations

import torch


def split(x: torch.Tensor, groups: int) -> torch.Tensor:
    """(..., N) -> (..., groups, N / groups); unchanged for one group."""
    return x if groups == 1 else x.view(*x.shape[:-1], groups, x.shape[-1] // groups)


def joined(x: torch.Tensor, groups: int) -> torch.Tensor:
    """(..., groups, N / groups) -> (..., N); unchanged for one group."""
    return x if groups == 1 else x.flatten(-2)


def weight_of_groups(
    weight: torch.Tensor | None, x: torch.Tensor, groups: int
) -> torch.Tensor | None:
    """The weight that multiplies `split(x, groups)`: (N,) is split, (N / groups,) is shared."""
    is_shared = weight is None or weight.shape[0] != x.shape[-1]
    return weight if weight is None or is_shared else split(weight, groups)
