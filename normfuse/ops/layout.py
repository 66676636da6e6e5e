"""Layouts in memory."""

from __future__ import annotations

import torch


def dense_like(value: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """`value`, laid out as `wanted`, which is dense: its elements have no gaps between them.

    Strides of axes of one element, which address nothing, may be others.
    Permuted, made contiguous and permuted back, not copied into an empty tensor: torch 2.11's
    Inductor may fuse such a copy on the CPU and then read a buffer that it never allocated.
    """
    if value.stride() == wanted.stride():
        return value
    order = sorted(range(wanted.dim()), key=wanted.stride, reverse=True)  # outermost first
    inverse = sorted(range(wanted.dim()), key=order.__getitem__)
    return value.permute(order).contiguous().permute(inverse)
