"""Residual add, then RMSNorm, over rows.

    total = (residual + x * branch_scale) * total_scale
    rstd  = 1 / sqrt(mean(total^2) + eps)
    y     = total * rstd * (weight + offset)

Backward, with unit = total * rstd and g = grad_y * (weight + offset):

    grad          = rstd * (g - unit * mean(g * unit)) + grad_total
    grad_residual = grad * total_scale
    grad_x        = grad_residual * branch_scale
    grad_weight   = sum over rows of grad_y * unit
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl

from normfuse.ops.kernels.chunks import (
    fenced,
    load_tiles,
    narrowed,
    num_tiles,
    num_tiles_read,
    row_of,
    store_tile,
    tile_at,
)
from normfuse.ops.kernels.constants import SumTypes, norm_constants
from normfuse.ops.kernels.row import (
    load_scale,
    normalised,
    residual_sum,
    root_of,
    row_index,
    squares,
    step,
    store_inverse_root,
    widened,
    zero_sums,
)
from normfuse.ops.kernels.rows import (
    addressed_by_one_stride,
    as_vector,
    copied_into,
    empty_sum,
    is_empty,
    num_rows,
    row_order,
)
from normfuse.ops.kernels.tile import Launch, device_of, eager

if TYPE_CHECKING:
    from normfuse.ops.residual_sum import Scales
    from normfuse.ops.rounding import RoundingPlan


@triton.jit
def _total(
    xs,
    residuals,
    x_ptr,
    residual_ptr,
    branch_scale,
    total_scale,
    is_row,
    index,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    READS: tl.constexpr,
    BRANCH_SCALE: tl.constexpr,
    TOTAL_SCALE: tl.constexpr,
    SUM: tl.constexpr,
):
    x = tile_at(xs, x_ptr, is_row, index, N, BLOCK, READS, "early")
    residual = tile_at(residuals, residual_ptr, is_row, index, N, BLOCK, READS, "early")
    return residual_sum(x, residual, branch_scale, total_scale, BRANCH_SCALE, TOTAL_SCALE, SUM)


@triton.jit
def add_rms_norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    branch_scale_ptr,
    total_scale_ptr,
    y_ptr,
    total_ptr,
    rstd_ptr,
    num_rows,
    stride_x_row,
    stride_residual_row,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    READS: tl.constexpr,
    BRANCH_SCALE: tl.constexpr,
    TOTAL_SCALE: tl.constexpr,
    SUM: tl.constexpr,
    EPS: tl.constexpr,
    OFFSET: tl.constexpr,
    PLAN: tl.constexpr,
):
    row = row_index(ROWS)
    is_row = row < num_rows
    x_ptr += row * stride_x_row
    residual_ptr += row * stride_residual_row
    y_ptr += row * N
    total_ptr = row_of(total_ptr, row, N)
    weight_ptr = row_of(weight_ptr, row, 0)
    xs = load_tiles(x_ptr, is_row, N, BLOCK, READS, "early")
    residuals = load_tiles(residual_ptr, is_row, N, BLOCK, READS, "early")
    weights = load_tiles(weight_ptr, None, N, BLOCK, READS, "ahead")
    branch_scale = load_scale(branch_scale_ptr)
    total_scale = load_scale(total_scale_ptr)
    sums = zero_sums(ROWS, BLOCK, PLAN)
    totals = ()
    for index in tl.static_range(num_tiles(N, BLOCK)):
        total = _total(
            xs, residuals, x_ptr, residual_ptr, branch_scale, total_scale, is_row, index,
            N, BLOCK, READS, BRANCH_SCALE, TOTAL_SCALE, SUM,
        )  # fmt: skip
        store_tile(total_ptr, total, is_row, index, N, BLOCK, READS)
        totals = totals + (narrowed(total, step(SUM, "total")),)
        sums += squares(total, PLAN)
    root = root_of(sums, None, N, EPS, PLAN)
    totals, weights = fenced(totals, READS), fenced(weights, READS)
    for index in tl.static_range(num_tiles(N, BLOCK)):
        if index < num_tiles_read(N, BLOCK, READS, "held"):
            total = widened(totals[index])
        else:
            total = _total(
                xs, residuals, x_ptr, residual_ptr, branch_scale, total_scale, is_row, index,
                N, BLOCK, READS, BRANCH_SCALE, TOTAL_SCALE, SUM,
            )  # fmt: skip
        weight = tile_at(weights, weight_ptr, None, index, N, BLOCK, READS, "ahead")
        y = normalised(total, root, weight, OFFSET, PLAN, False)
        store_tile(y_ptr, y, is_row, index, N, BLOCK, READS)
    store_inverse_root(rstd_ptr, root, row, num_rows, PLAN)


def launch(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None,
    scales: Scales,
    eps: float,
    offset: float,
    plan: RoundingPlan,
    *,
    store_total: bool = True,
    store_rstd: bool = True,
    tile: Launch | None = None,
    wrap: Callable[[Any], Any] = eager,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """x, residual (..., N) -> y (..., N) in `plan.out`, total (..., N), rstd (..., 1).

    `total` has the type that torch promotes the sum to and is laid out as `residual + x`. A result
    whose `store_` flag is off is None. `tile` and `wrap` as in `rms_norm.launch`.
    """
    types = SumTypes.of(x.dtype, residual.dtype, scales)
    is_scaled = scales.branch is not None or scales.branch_tensor is not None
    y = empty_sum(x, residual, plan.out, is_fresh=is_scaled)
    total = torch.empty_like(y, dtype=types.total) if store_total else None
    rstd = y.new_empty((*y.shape[:-1], 1), dtype=plan.compute) if store_rstd else None
    if is_empty(x):
        return y, total, rstd
    order = row_order(y, total, rstd)
    if order is None:
        stores = {"store_total": store_total, "store_rstd": store_rstd}
        again = partial(launch, **stores, tile=tile, wrap=wrap)
        dense = x.contiguous(), residual.contiguous()
        values = again(*dense, weight, scales, eps, offset, plan)
        return copied_into((y, total, rstd), values)
    x, stride_x = addressed_by_one_stride(x, order, y)
    residual, stride_residual = addressed_by_one_stride(residual, order, y)
    tile = tile or Launch.for_shape(x.shape[-1], types.total, plan.compute, op="add_rms_norm")
    with device_of(x, wrap):
        wrap(add_rms_norm_kernel)[tile.grid(num_rows(x))](
            x,
            residual,
            as_vector(weight),
            scales.branch_tensor,
            scales.total_tensor,
            y,
            total,
            rstd,
            num_rows(x),
            stride_x,
            stride_residual,
            **tile.constants(x.shape[-1], num_rows(x)),
            **types.constants(scales),
            **norm_constants(plan, eps, offset),
            num_warps=tile.num_warps,
        )
    return y, total, rstd
