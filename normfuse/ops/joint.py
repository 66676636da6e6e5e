"""Norms over all heads of a token at once: OLMo 2, OLMoE, MiniMax M2.

Such a model normalises a whole projection (..., H * D) before it is taken apart into heads. Where
the heads turn in the same op, x is the heads (..., H, ..., D), and its weight says what the norm
runs over: one of shape (H, 1, ..., D), whose first axis is that of the heads, over all heads of a
token; one of shape (D,) over each head alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch

from normfuse.ops.layout import dense_like
from normfuse.ops.one_launch import MAX_WIDTH


def heads_axis(weight: torch.Tensor | None) -> int | None:
    """Which axis of x, counted from the end, the norm spans beside the last; None if none."""
    if weight is None or weight.dim() < 2:
        return None
    return -weight.dim()


def num_joint(weight: torch.Tensor | None) -> int:
    """How many heads one norm spans."""
    return 1 if weight is None or weight.dim() < 2 else weight.shape[0]


def joined(heads: torch.Tensor, axis: int) -> torch.Tensor:
    """(..., H, ..., D) -> (..., H * D): the heads of a token side by side."""
    return heads.movedim(axis, -2).flatten(-2)


def apart(rows: torch.Tensor, axis: int, num_heads: int) -> torch.Tensor:
    """(..., H * D) -> (..., H, ..., D): the inverse of `joined`."""
    heads = rows.view(*rows.shape[:-1], num_heads, rows.shape[-1] // num_heads)
    return heads.movedim(-2, axis)


def laid_out_as(rows: torch.Tensor, axis: int, heads: torch.Tensor) -> torch.Tensor:
    """A result (..., H * D) as heads, with the layout of `torch.empty_like(heads)`."""
    result = apart(rows, axis, heads.shape[axis])
    return dense_like(result, torch.empty_like(heads, dtype=result.dtype))


def empty_statistic(x: torch.Tensor, axis: int, dtype: torch.dtype) -> torch.Tensor:
    """An uninitialised rstd of x, of size 1 along the axis of the heads and the last."""
    tokens = [size for dim, size in enumerate(x.shape[:-1]) if dim != x.dim() + axis]
    return apart(x.new_empty((*tokens, 1), dtype=dtype), axis, 1)


def obstacle_to_joint_norms(
    xs: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor | None],
    cos: torch.Tensor | None = None,
) -> str | None:
    """Why the kernel cannot take norms over several heads, as a sentence; None if it can.

    Args:
        xs: (..., D_i), those of one launch.
        weights: of each, None for a weightless one.
        cos: what broadcasts against those that turn, if any does.
    """
    from normfuse.ops.kernels.rows import known

    for x, weight in zip(xs, weights, strict=True):
        axis = heads_axis(weight)
        if axis is None:
            continue
        sizes = x.shape[axis], x.shape[-1]
        if not all(isinstance(size, int) for size in sizes):
            return "the number of heads is symbolic, and the kernel is compiled for one"
        if _power_of_2(sizes[0]) * _power_of_2(sizes[1]) > MAX_WIDTH:
            return f"the heads of a token are wider than the {MAX_WIDTH} that a program holds"
        if not (known(x.stride(-1) == 1) and known(x.stride(axis) == sizes[1])):
            return "the heads of a token do not lie side by side, and one program takes them all"
        if not _follow(x, axis):
            return "the tokens do not lie in order, as the kernel writes their statistics"
        if cos is not None and cos.dim() >= -axis and not known(cos.shape[axis] == 1):
            return "heads of one token turn by different angles, and one program takes them all"
    return None


def _power_of_2(size: int) -> int:
    return 1 << (size - 1).bit_length()


def _follow(x: torch.Tensor, axis: int) -> bool:
    """Whether the axes of tokens stand in the order in which they lie in memory."""
    from normfuse.ops.kernels.rows import known

    leading = [dim for dim in range(x.dim() - 1) if dim != x.dim() + axis]
    strides = [x.stride(dim) for dim in leading if not known(x.shape[dim] == 1)]
    return all(known(outer >= inner) for outer, inner in pairwise(strides))
