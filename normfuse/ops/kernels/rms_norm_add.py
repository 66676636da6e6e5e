"""RMSNorm, then residual add, over rows.

    rstd  = 1 / sqrt(mean(x^2) + eps)
    total = (residual + x * rstd * (weight + offset) * branch_scale) * total_scale

Backward, with unit = x * rstd:

    grad_residual = grad_total * total_scale
    grad_branch   = grad_residual * branch_scale
    g             = grad_branch * (weight + offset)
    grad_x        = rstd * (g - unit * mean(g * unit))
    grad_weight   = sum over rows of grad_branch * unit
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl

from normfuse.ops.kernels.chunks import fenced, load_tiles, num_tiles, row_of, store_tile, tile_at
from normfuse.ops.kernels.constants import SumTypes, norm_constants
from normfuse.ops.kernels.row import (
    load_scale,
    normalised,
    residual_sum,
    root_of,
    row_index,
    squares,
    store_inverse_root,
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
def rms_norm_add_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    branch_scale_ptr,
    total_scale_ptr,
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
    total_ptr += row * N
    weight_ptr = row_of(weight_ptr, row, 0)
    xs = load_tiles(x_ptr, is_row, N, BLOCK, READS, "held")
    residuals = load_tiles(residual_ptr, is_row, N, BLOCK, READS, "beside")
    weights = load_tiles(weight_ptr, None, N, BLOCK, READS, "ahead")
    branch_scale = load_scale(branch_scale_ptr)
    total_scale = load_scale(total_scale_ptr)
    sums = zero_sums(ROWS, BLOCK, PLAN)
    for index in tl.static_range(num_tiles(N, BLOCK)):
        x = tile_at(xs, x_ptr, is_row, index, N, BLOCK, READS, "held")
        sums += squares(x, PLAN)
    root = root_of(sums, None, N, EPS, PLAN)
    xs, residuals, weights = fenced(xs, READS), fenced(residuals, READS), fenced(weights, READS)
    for index in tl.static_range(num_tiles(N, BLOCK)):
        x = tile_at(xs, x_ptr, is_row, index, N, BLOCK, READS, "held")
        weight = tile_at(weights, weight_ptr, None, index, N, BLOCK, READS, "ahead")
        branch = normalised(x, root, weight, OFFSET, PLAN, True)
        residual = tile_at(residuals, residual_ptr, is_row, index, N, BLOCK, READS, "beside")
        total = residual_sum(
            branch, residual, branch_scale, total_scale, BRANCH_SCALE, TOTAL_SCALE, SUM
        )
        store_tile(total_ptr, total, is_row, index, N, BLOCK, READS)
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
    store_rstd: bool = True,
    tile: Launch | None = None,
    wrap: Callable[[Any], Any] = eager,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """x, residual (..., N) -> total (..., N), rstd (..., 1) in `plan.compute` or None.

    `total` has the type that torch promotes the sum to and is laid out as `residual + norm(x)`.
    `store_rstd`, `tile` and `wrap` as in `rms_norm.launch`.
    """
    types = SumTypes.of(plan.out, residual.dtype, scales)
    total = empty_sum(x, residual, types.total, is_fresh=True)
    rstd = x.new_empty((*x.shape[:-1], 1), dtype=plan.compute) if store_rstd else None
    if is_empty(x):
        return total, rstd
    order = row_order(total, rstd)
    if order is None:
        again = partial(launch, store_rstd=store_rstd, tile=tile, wrap=wrap)
        dense = x.contiguous(), residual.contiguous()
        return copied_into((total, rstd), again(*dense, weight, scales, eps, offset, plan))
    x, stride_x = addressed_by_one_stride(x, order, total)
    residual, stride_residual = addressed_by_one_stride(residual, order, total)
    tile = tile or Launch.for_shape(x.shape[-1], types.total, plan.compute, op="rms_norm_add")
    with device_of(x, wrap):
        wrap(rms_norm_add_kernel)[tile.grid(num_rows(x))](
            x,
            residual,
            as_vector(weight),
            scales.branch_tensor,
            scales.total_tensor,
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
    return total, rstd
