"""Rotary embedding without a norm: the kernel of `qk_rms_norm_rope` with nothing normalised.

y_a  = x_a * cos_a - x_b * sin_a        for every pair (a, b) of columns that turn
y_b  = x_b * cos_b + x_a * sin_b
y_c  = x_c                              for the others
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from normfuse.ops.kernels.qk_rms_norm_rope import Heads, launch_heads, written
from normfuse.ops.kernels.slots import HeadsLaunch
from normfuse.ops.kernels.tile import eager

if TYPE_CHECKING:
    from normfuse.ops.destinations import Writes
    from normfuse.ops.rotation import Rotation


def launch(
    xs: Sequence[torch.Tensor],
    cos: torch.Tensor,
    sin: torch.Tensor,
    rotations: Sequence[Rotation],
    *,
    writes: Writes | None = None,
    tile: HeadsLaunch | None = None,
    wrap: Callable[[Any], Any] = eager,
) -> list[torch.Tensor | None]:
    """n <= 3 tensors (..., N_i) -> the same, turned.

    Args:
        xs: rows of any strides, of up to 4 dimensions, that fit a program whole.
        cos: broadcasts against every x.
        sin: the same.
        rotations: how they turn.
        writes: what is written elsewhere, too; the memory of it follows the others.
        tile: by default the one for these widths.
        wrap: how a compiler sees the launch; `torch.library.wrap_triton`.
    """
    heads = [Heads(x, None, None, turn) for x, turn in zip(xs, rotations, strict=True)]
    slots = launch_heads(heads, cos, sin, writes, tile, wrap)
    return [slot.finished() for slot in slots[: len(xs)]] + written(slots)
