"""The sandwich over rows: RMSNorm, residual add, RMSNorm.

    rstd_1 = 1 / sqrt(mean(x^2) + eps_1)
    total  = (residual + x * rstd_1 * (weight_1 + offset_1) * branch_scale) * total_scale
    rstd_2 = 1 / sqrt(mean(total^2) + eps_2)
    y      = total * rstd_2 * (weight_2 + offset_2)

Backward, with norm'(g; x) = rstd * (g - unit * mean(g * unit)) and unit = x * rstd:

    grad          = norm'(grad_y * (weight_2 + offset_2); total) + grad_total
    grad_residual = grad * total_scale
    grad_branch   = grad_residual * branch_scale
    grad_x        = norm'(grad_branch * (weight_1 + offset_1); x)
    grad_weight_1 = sum over rows of grad_branch * unit_1
    grad_weight_2 = sum over rows of grad_y * unit_2
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
    weights,
    x_ptr,
    residual_ptr,
    weight_ptr,
    root,
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
    OFFSET: tl.constexpr,
    PLAN: tl.constexpr,
):
    x = tile_at(xs, x_ptr, is_row, index, N, BLOCK, READS, "held")
    weight = tile_at(weights, weight_ptr, None, index, N, BLOCK, READS, "ahead")
    branch = normalised(x, root, weight, OFFSET, PLAN, True)
    residual = tile_at(residuals, residual_ptr, is_row, index, N, BLOCK, READS, "beside")
    return residual_sum(branch, residual, branch_scale, total_scale, BRANCH_SCALE, TOTAL_SCALE, SUM)


@triton.jit
def rms_norm_add_rms_norm_kernel(
    x_ptr,
    residual_ptr,
    weight_1_ptr,
    weight_2_ptr,
    branch_scale_ptr,
    total_scale_ptr,
    y_ptr,
    total_ptr,
    rstd_1_ptr,
    rstd_2_ptr,
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
    EPS_1: tl.constexpr,
    OFFSET_1: tl.constexpr,
    PLAN_1: tl.constexpr,
    EPS_2: tl.constexpr,
    OFFSET_2: tl.constexpr,
    PLAN_2: tl.constexpr,
):
    row = row_index(ROWS)
    is_row = row < num_rows
    x_ptr += row * stride_x_row
    residual_ptr += row * stride_residual_row
    y_ptr += row * N
    total_ptr = row_of(total_ptr, row, N)
    weight_1_ptr = row_of(weight_1_ptr, row, 0)
    weight_2_ptr = row_of(weight_2_ptr, row, 0)
    xs = load_tiles(x_ptr, is_row, N, BLOCK, READS, "held")
    residuals = load_tiles(residual_ptr, is_row, N, BLOCK, READS, "beside")
    weights_1 = load_tiles(weight_1_ptr, None, N, BLOCK, READS, "ahead")
    weights_2 = load_tiles(weight_2_ptr, None, N, BLOCK, READS, "ahead")
    branch_scale = load_scale(branch_scale_ptr)
    total_scale = load_scale(total_scale_ptr)
    sums_1 = zero_sums(ROWS, BLOCK, PLAN_1)
    if num_tiles_read(N, BLOCK, READS, "held") > 0:
        for index in tl.static_range(num_tiles(N, BLOCK)):
            x = tile_at(xs, x_ptr, is_row, index, N, BLOCK, READS, "held")
            sums_1 += squares(x, PLAN_1)
        root_1 = root_of(sums_1, None, N, EPS_1, PLAN_1)
        xs, residuals = fenced(xs, READS), fenced(residuals, READS)
        weights_1, weights_2 = fenced(weights_1, READS), fenced(weights_2, READS)
        sums_2 = zero_sums(ROWS, BLOCK, PLAN_2)
        totals = ()
        for index in tl.static_range(num_tiles(N, BLOCK)):
            total = _total(
                xs, residuals, weights_1, x_ptr, residual_ptr, weight_1_ptr,
                root_1, branch_scale, total_scale, is_row, index,
                N, BLOCK, READS, BRANCH_SCALE, TOTAL_SCALE, SUM, OFFSET_1, PLAN_1,
            )  # fmt: skip
            store_tile(total_ptr, total, is_row, index, N, BLOCK, READS)
            totals = totals + (narrowed(total, step(SUM, "total")),)
            sums_2 += squares(total, PLAN_2)
        root_2 = root_of(sums_2, None, N, EPS_2, PLAN_2)
        totals = fenced(totals, READS)
        for index in tl.static_range(num_tiles(N, BLOCK)):
            weight_2 = tile_at(weights_2, weight_2_ptr, None, index, N, BLOCK, READS, "ahead")
            if index < num_tiles_read(N, BLOCK, READS, "held"):
                total = widened(totals[index])
            else:
                total = _total(
                    xs, residuals, weights_1, x_ptr, residual_ptr, weight_1_ptr,
                    root_1, branch_scale, total_scale, is_row, index,
                    N, BLOCK, READS, BRANCH_SCALE, TOTAL_SCALE, SUM, OFFSET_1, PLAN_1,
                )  # fmt: skip
            y = normalised(total, root_2, weight_2, OFFSET_2, PLAN_2, False)
            store_tile(y_ptr, y, is_row, index, N, BLOCK, READS)
    else:  # a loop at run time: unrolled, so many tiles would run out of registers
        for index in range(num_tiles(N, BLOCK)):
            x = tile_at(xs, x_ptr, is_row, index, N, BLOCK, READS, "held")
            sums_1 += squares(x, PLAN_1)
        root_1 = root_of(sums_1, None, N, EPS_1, PLAN_1)
        sums_2 = zero_sums(ROWS, BLOCK, PLAN_2)
        for index in range(num_tiles(N, BLOCK)):
            total = _total(
                xs, residuals, weights_1, x_ptr, residual_ptr, weight_1_ptr,
                root_1, branch_scale, total_scale, is_row, index,
                N, BLOCK, READS, BRANCH_SCALE, TOTAL_SCALE, SUM, OFFSET_1, PLAN_1,
            )  # fmt: skip
            sums_2 += squares(total, PLAN_2)
        root_2 = root_of(sums_2, None, N, EPS_2, PLAN_2)
        for index in range(num_tiles(N, BLOCK)):
            total = _total(
                xs, residuals, weights_1, x_ptr, residual_ptr, weight_1_ptr,
                root_1, branch_scale, total_scale, is_row, index,
                N, BLOCK, READS, BRANCH_SCALE, TOTAL_SCALE, SUM, OFFSET_1, PLAN_1,
            )  # fmt: skip
            store_tile(total_ptr, total, is_row, index, N, BLOCK, READS)
            weight_2 = tile_at(weights_2, weight_2_ptr, None, index, N, BLOCK, READS, "ahead")
            y = normalised(total, root_2, weight_2, OFFSET_2, PLAN_2, False)
            store_tile(y_ptr, y, is_row, index, N, BLOCK, READS)
    store_inverse_root(rstd_1_ptr, root_1, row, num_rows, PLAN_1)
    store_inverse_root(rstd_2_ptr, root_2, row, num_rows, PLAN_2)


def launch(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight_1: torch.Tensor | None,
    weight_2: torch.Tensor | None,
    scales: Scales,
    eps_1: float,
    offset_1: float,
    plan_1: RoundingPlan,
    eps_2: float,
    offset_2: float,
    plan_2: RoundingPlan,
    *,
    store_total: bool = True,
    store_rstd_1: bool = True,
    store_rstd_2: bool = True,
    tile: Launch | None = None,
    wrap: Callable[[Any], Any] = eager,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """x, residual (..., N) -> y (..., N) in `plan_2.out`, total (..., N), two rstd (..., 1).

    The two norms as in `rms_norm.launch`, the sum and the flags as in `add_rms_norm.launch`.
    """
    types = SumTypes.of(plan_1.out, residual.dtype, scales)
    y = empty_sum(x, residual, plan_2.out, is_fresh=True)
    total = torch.empty_like(y, dtype=types.total) if store_total else None
    rstd_1 = x.new_empty((*x.shape[:-1], 1), dtype=plan_1.compute) if store_rstd_1 else None
    rstd_2 = y.new_empty((*y.shape[:-1], 1), dtype=plan_2.compute) if store_rstd_2 else None
    results = (y, total, rstd_1, rstd_2)
    if is_empty(x):
        return results
    order = row_order(*results)
    if order is None:
        flags = {"store_rstd_1": store_rstd_1, "store_rstd_2": store_rstd_2}
        again = partial(launch, store_total=store_total, **flags, tile=tile, wrap=wrap)
        dense = x.contiguous(), residual.contiguous()
        norms = eps_1, offset_1, plan_1, eps_2, offset_2, plan_2
        return copied_into(results, again(*dense, weight_1, weight_2, scales, *norms))
    x, stride_x = addressed_by_one_stride(x, order, y)
    residual, stride_residual = addressed_by_one_stride(residual, order, y)
    op = "rms_norm_add_rms_norm"
    tile = tile or Launch.for_shape(x.shape[-1], types.total, plan_1.compute, op=op)
    with device_of(x, wrap):
        wrap(rms_norm_add_rms_norm_kernel)[tile.grid(num_rows(x))](
            x,
            residual,
            as_vector(weight_1),
            as_vector(weight_2),
            scales.branch_tensor,
            scales.total_tensor,
            *results,
            num_rows(x),
            stride_x,
            stride_residual,
            **tile.constants(x.shape[-1], num_rows(x)),
            **types.constants(scales),
            **norm_constants(plan_1, eps_1, offset_1, "_1"),
            **norm_constants(plan_2, eps_2, offset_2, "_2"),
            num_warps=tile.num_warps,
        )
    return results
