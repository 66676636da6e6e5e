"""Rotary embedding without a norm: the kernel of `qk_rms_norm_rope` with nothing normalised.

y_a  = x_a * cos_a - x_b * sin_a        for every pair (a, b) of columns that turn
y_b  = x_b * cos_b + x_a * sin_b
y_c  = x_c                              for the others
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from normfuse.ops.kernels.qk_rms_norm_rope import launch_slots
from normfuse.ops.kernels.rows import is_empty
from normfuse.ops.kernels.slots import SLOTS, HeadsLaunch, Slot, equally_laid_out
from normfuse.ops.kernels.tile import eager

if TYPE_CHECKING:
    from normfuse.ops.rotation import Rotation


def launch(
    xs: Sequence[torch.Tensor],
    cos: torch.Tensor,
    sin: torch.Tensor,
    rotations: Sequence[Rotation],
    *,
    tile: HeadsLaunch | None = None,
    wrap: Callable[[Any], Any] = eager,
) -> list[torch.Tensor | None]:
    """n <= 3 tensors (..., N_i) -> the same, turned.

    Args:
        xs: rows of any strides, of up to 4 dimensions, that fit a program whole.
        cos: broadcasts against every x.
        sin: the same.
        rotations: how they turn.
        tile: by default the one for these widths.
        wrap: how a compiler sees the launch; `torch.library.wrap_triton`.
    """
    assert 1 <= len(xs) <= SLOTS, f"one launch takes up to {SLOTS} tensors, got {len(xs)}"
    tables = equally_laid_out(cos, sin)
    tile = tile or HeadsLaunch.for_slots(xs, rotations, ())
    slots = [
        Slot.of(x, None, tables, None, rotation, tile=tile, store_rstd=False)
        for x, rotation in zip(xs, rotations, strict=True)
    ]
    filled = [slot for x, slot in zip(xs, slots, strict=True) if not is_empty(x)]
    if filled:
        launch_slots(filled, tables, tile, xs[0], wrap)
    return [slot.finished() for slot in slots]
