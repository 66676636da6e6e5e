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

from normfuse.ops.kernels.constants import SumTypes, norm_constants
from normfuse.ops.kernels.row import (
    load_held,
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
def _total(
    x_ptr,
    residual_ptr,
    branch_scale_ptr,
    total_scale_ptr,
    cols,
    mask,
    BRANCH_SCALE: tl.constexpr,
    TOTAL_SCALE: tl.constexpr,
    SUM: tl.constexpr,
):
    x = load_held(x_ptr + cols, mask)
    residual = load_held(residual_ptr + cols, mask)
    return residual_sum(
        x, residual, branch_scale_ptr, total_scale_ptr,
        BRANCH_SCALE, TOTAL_SCALE, SUM,
    )  # fmt: skip


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
    BRANCH_SCALE: tl.constexpr,
    TOTAL_SCALE: tl.constexpr,
    SUM: tl.constexpr,
    EPS: tl.constexpr,
    OFFSET: tl.constexpr,
    PLAN: tl.constexpr,
):
    row = row_index(ROWS)
    x_ptr += row * stride_x_row
    residual_ptr += row * stride_residual_row
    y_ptr += row * N
    if total_ptr is not None:
        total_ptr += row * N
    cols = tl.arange(0, BLOCK)[None, :]
    if BLOCK >= N:
        mask = (row < num_rows) & (cols < N)
        total = _total(
            x_ptr, residual_ptr, branch_scale_ptr, total_scale_ptr, cols, mask,
            BRANCH_SCALE, TOTAL_SCALE, SUM,
        )  # fmt: skip
        if total_ptr is not None:
            tl.store(total_ptr + cols, total, mask=mask)
        root = root_of(squares(total, PLAN), None, N, EPS, PLAN)
        y = normalised(total, root, weight_ptr, cols, N, OFFSET, PLAN, False)
        tl.store(y_ptr + cols, y, mask=mask)
    else:
        sums = zero_sums(ROWS, BLOCK, PLAN)
        for start in range(0, N, BLOCK):
            mask = (row < num_rows) & (start + cols < N)
            total = _total(
                x_ptr, residual_ptr, branch_scale_ptr, total_scale_ptr, start + cols, mask,
                BRANCH_SCALE, TOTAL_SCALE, SUM,
            )  # fmt: skip
            sums += squares(total, PLAN)
        root = root_of(sums, None, N, EPS, PLAN)
        for start in range(0, N, BLOCK):
            mask = (row < num_rows) & (start + cols < N)
            total = _total(
                x_ptr, residual_ptr, branch_scale_ptr, total_scale_ptr, start + cols, mask,
                BRANCH_SCALE, TOTAL_SCALE, SUM,
            )  # fmt: skip
            if total_ptr is not None:
                tl.store(total_ptr + start + cols, total, mask=mask)
            y = normalised(total, root, weight_ptr, start + cols, N, OFFSET, PLAN, False)
            tl.store(y_ptr + start + cols, y, mask=mask)
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
    tile = tile or Launch.for_shape(x.shape[-1], torch.promote_types(types.total, plan.compute))
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
            N=x.shape[-1],
            ROWS=tile.rows,
            BLOCK=tile.block,
            **types.constants(scales),
            **norm_constants(plan, eps, offset),
            num_warps=tile.num_warps,
        )
    return y, total, rstd
