"""RMSNorm, then a modulation, over rows.

    rstd = 1 / sqrt(mean(x^2) + eps)
    n    = x * rstd * (weight + offset)
    y    = n * (scale + scale_offset) + shift

Scale and shift broadcast over rows: the strides of such axes are 0.

Backward:

    grad_shift = grad_y, summed over the rows that share it
    grad_scale = grad_y * n, likewise
    grad_x     = that of the norm, for grad_y * (scale + scale_offset)
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl

from normfuse.ops.kernels.chunks import fenced, load_tiles, num_tiles, row_of, store_tile, tile_at
from normfuse.ops.kernels.constants import norm_constants
from normfuse.ops.kernels.row import (
    modulated,
    normalised,
    root_of,
    row_index,
    row_start,
    squares,
    step,
    store_inverse_root,
    zero_sums,
)
from normfuse.ops.kernels.rows import (
    RowStrides,
    addressed,
    as_vector,
    copied_into,
    empty_modulated,
    is_empty,
    num_rows,
    row_order,
)
from normfuse.ops.kernels.tile import Launch, device_of, eager

if TYPE_CHECKING:
    from normfuse.ops.modulation import Modulation
    from normfuse.ops.rounding import RoundingPlan


@triton.jit
def modulated_rms_norm_kernel(
    x_ptr,
    scale_ptr,
    shift_ptr,
    weight_ptr,
    y_ptr,
    rstd_ptr,
    num_rows,
    size_x_middle,
    size_x_inner,
    stride_x_outer,
    stride_x_middle,
    stride_x_inner,
    size_scale_middle,
    size_scale_inner,
    stride_scale_outer,
    stride_scale_middle,
    stride_scale_inner,
    size_shift_middle,
    size_shift_inner,
    stride_shift_outer,
    stride_shift_middle,
    stride_shift_inner,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    READS: tl.constexpr,
    SCALE_OFFSET: tl.constexpr,
    MODULATION: tl.constexpr,
    EPS: tl.constexpr,
    OFFSET: tl.constexpr,
    PLAN: tl.constexpr,
):
    row = row_index(ROWS)
    x_ptr += row_start(
        row, size_x_middle, size_x_inner, stride_x_outer, stride_x_middle, stride_x_inner
    )
    scale_ptr += row_start(
        row,
        size_scale_middle,
        size_scale_inner,
        stride_scale_outer,
        stride_scale_middle,
        stride_scale_inner,
    )
    if shift_ptr is not None:
        shift_ptr += row_start(
            row,
            size_shift_middle,
            size_shift_inner,
            stride_shift_outer,
            stride_shift_middle,
            stride_shift_inner,
        )
    y_ptr += row * N
    is_row = row < num_rows
    weight_ptr = row_of(weight_ptr, row, 0)
    xs = load_tiles(x_ptr, is_row, N, BLOCK, READS, "held")
    weights = load_tiles(weight_ptr, None, N, BLOCK, READS, "ahead")
    scales = load_tiles(scale_ptr, is_row, N, BLOCK, READS, "ahead")
    shifts = load_tiles(shift_ptr, is_row, N, BLOCK, READS, "ahead")
    sums = zero_sums(ROWS, BLOCK, PLAN)
    for index in tl.static_range(num_tiles(N, BLOCK)):
        x = tile_at(xs, x_ptr, is_row, index, N, BLOCK, READS, "held")
        sums += squares(x, PLAN)
    root = root_of(sums, None, N, EPS, PLAN)
    xs, weights = fenced(xs, READS), fenced(weights, READS)
    scales, shifts = fenced(scales, READS), fenced(shifts, READS)
    for index in tl.static_range(num_tiles(N, BLOCK)):
        x = tile_at(xs, x_ptr, is_row, index, N, BLOCK, READS, "held")
        weight = tile_at(weights, weight_ptr, None, index, N, BLOCK, READS, "ahead")
        y = normalised(x, root, weight, OFFSET, PLAN, False)
        scale = tile_at(scales, scale_ptr, is_row, index, N, BLOCK, READS, "ahead")
        shift = tile_at(shifts, shift_ptr, is_row, index, N, BLOCK, READS, "ahead")
        y = modulated(y, scale, shift, SCALE_OFFSET, MODULATION, step(PLAN, "on"))
        store_tile(y_ptr, y, is_row, index, N, BLOCK, READS)
    store_inverse_root(rstd_ptr, root, row, num_rows, PLAN)


def launch(
    x: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor | None,
    weight: torch.Tensor | None,
    eps: float,
    offset: float,
    scale_offset: float,
    plan: RoundingPlan,
    modulation: Modulation,
    *,
    store_rstd: bool = True,
    tile: Launch | None = None,
    wrap: Callable[[Any], Any] = eager,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """x (..., N), scale and shift that broadcast to it -> y (..., N), rstd (..., 1) or None.

    `store_rstd`, `tile` and `wrap` as in `rms_norm.launch`.
    """
    y = empty_modulated(x, (scale,) if shift is None else (scale, shift), modulation.out)
    rstd = x.new_empty((*x.shape[:-1], 1), dtype=plan.compute) if store_rstd else None
    if is_empty(x):
        return y, rstd
    order = row_order(y, rstd)
    scale, shift = scale.expand(x.shape), None if shift is None else shift.expand(x.shape)
    if order is None:
        again = partial(launch, store_rstd=store_rstd, tile=tile, wrap=wrap)
        norm = (weight, eps, offset, scale_offset, plan, modulation)
        return copied_into((y, rstd), again(x.contiguous(), scale, shift, *norm))
    x, strides_x = addressed(x, order, y)
    scale, strides_scale = addressed(scale, order, y)
    strides_shift = RowStrides(1, 1, 0, 0, 0)
    if shift is not None:
        shift, strides_shift = addressed(shift, order, y)
    compute = torch.promote_types(plan.compute, modulation.sum)
    tile = tile or Launch.for_shape(x.shape[-1], x.dtype, compute, op="modulated_rms_norm")
    with device_of(x, wrap):
        wrap(modulated_rms_norm_kernel)[tile.grid(num_rows(x))](
            x,
            scale,
            shift,
            as_vector(weight),
            y,
            rstd,
            num_rows(x),
            *strides_x,
            *strides_scale,
            *strides_shift,
            **tile.constants(x.shape[-1], num_rows(x)),
            SCALE_OFFSET=float(scale_offset),
            MODULATION=str(modulation),
            **norm_constants(plan, eps, offset),
            num_warps=tile.num_warps,
        )
    return y, rstd
