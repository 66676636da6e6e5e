"""The gradients of RMSNorm over rows, and of a residual sum before or after it.

With unit = x * rstd and g = grad_y * (weight + offset):

    grad_x      = rstd * (g - unit * mean(g * unit))
    grad_weight = sum over rows of grad_y * unit

Where a sum comes first (add_rms_norm), x is the sum, and its own gradient is added before the one
store: grad = grad_x + grad_total, grad_residual = grad * total_scale, and grad_residual *
branch_scale is the gradient of the other operand. Where the sum comes last (rms_norm_add),
grad_residual = grad_total * total_scale and grad_y = grad_residual * branch_scale.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton
import triton.language as tl

from normfuse.ops.kernels.constants import NAMES
from normfuse.ops.kernels.row import row_of_tile
from normfuse.ops.kernels.row_backward import (
    load_held_weight,
    load_rstd,
    load_scale,
    mean_of,
    store_gradients,
    store_partial,
    weighted,
    wide_type,
    zeros,
)
from normfuse.ops.kernels.rows import (
    addressed_by_one_stride,
    as_vector,
    copied_into,
    is_empty,
    num_rows,
    row_order,
)
from normfuse.ops.kernels.stream_backward import stream_norm
from normfuse.ops.kernels.tile import device_of, eager
from normfuse.ops.kernels.tile_backward import (
    BackwardLaunch,
    launch_for,
    no_gradients,
    offset_of,
    partial_sums,
    scale_constants,
    sum_partials,
)

if TYPE_CHECKING:
    from normfuse.ops.residual_sum import Scales
    from normfuse.ops.rounding import RoundingPlan


@triton.jit
def _held_row(
    sums, weights, grad_y_ptr, grad_total_ptr, x_ptr, grad_x_ptr, grad_residual_ptr,
    rstd, branch_scale, total_scale, is_row, all_cols,
    N: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, CHUNKS: tl.constexpr,
    SHARE: tl.constexpr, OFFSET: tl.constexpr, SUM: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One tile of rows, read once; returns the sums of the weight's gradient with its own."""
    TYPE: tl.constexpr = wide_type(WIDE)
    products = zeros(ROWS, BLOCK, WIDE)
    xs = ()
    grads = ()
    for chunk in tl.static_range(CHUNKS):
        cols = chunk * BLOCK + all_cols
        mask = is_row & (cols < N)
        x = tl.load(x_ptr + cols, mask=mask, other=0.0)
        grad = tl.load(grad_y_ptr + cols, mask=mask, other=0.0)
        xs += (x,)  # held in the narrow type in which they come
        grads += (grad,)
        products += weighted(grad.to(TYPE), weights[chunk], OFFSET, WIDE) * x.to(TYPE)
    mean = mean_of(products, rstd, branch_scale, total_scale, SHARE, SUM)
    added = ()
    for chunk in tl.static_range(CHUNKS):
        cols = chunk * BLOCK + all_cols
        unit = xs[chunk].to(TYPE) * rstd
        grad_y = store_gradients(
            grads[chunk].to(TYPE), weights[chunk], unit, rstd, mean,
            grad_total_ptr, grad_x_ptr, grad_residual_ptr,
            branch_scale, total_scale, cols, is_row & (cols < N), OFFSET, SUM, WIDE,
        )  # fmt: skip
        added += (sums[chunk] + grad_y * unit,)
    return added


@triton.jit
def rms_norm_backward_kernel(
    grad_y_ptr, grad_total_ptr, x_ptr, weight_ptr, rstd_ptr,
    branch_scale_ptr, total_scale_ptr,
    grad_x_ptr, grad_residual_ptr, partial_ptr,
    num_rows, stride_grad_y_row, stride_grad_total_row, stride_x_row,
    N: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, CHUNKS: tl.constexpr,
    HELD: tl.constexpr, STAGES: tl.constexpr, SHARE: tl.constexpr, OFFSET: tl.constexpr,
    BRANCH_SCALE: tl.constexpr, TOTAL_SCALE: tl.constexpr, SUM: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Each program takes every num_programs-th tile of rows; SHARE is 1 / N, or 1 for an L2 norm"""
    branch_scale = load_scale(branch_scale_ptr, BRANCH_SCALE, WIDE)
    total_scale = load_scale(total_scale_ptr, TOTAL_SCALE, WIDE)
    all_cols = tl.arange(0, BLOCK)[None, :]
    sums = ()
    weights = ()
    for chunk in tl.static_range(CHUNKS):
        sums += (zeros(ROWS, BLOCK, WIDE),)
        weights += (load_held_weight(weight_ptr, chunk * BLOCK + all_cols, N, ROWS),)
    num_tiles = tl.cdiv(num_rows, ROWS)
    for tile in tl.range(tl.program_id(0), num_tiles, tl.num_programs(0), num_stages=STAGES):
        row = row_of_tile(tile, ROWS)
        rstd = load_rstd(rstd_ptr, row, num_rows, WIDE)
        grad_y_row = grad_y_ptr + row * stride_grad_y_row
        grad_total_row = (
            None if grad_total_ptr is None else grad_total_ptr + row * stride_grad_total_row
        )
        x_row = x_ptr + row * stride_x_row
        grad_x_row = None if grad_x_ptr is None else grad_x_ptr + row * N
        grad_residual_row = None if grad_residual_ptr is None else grad_residual_ptr + row * N
        if HELD:
            sums = _held_row(
                sums, weights, grad_y_row, grad_total_row, x_row, grad_x_row, grad_residual_row,
                rstd, branch_scale, total_scale, row < num_rows, all_cols,
                N, ROWS, BLOCK, CHUNKS, SHARE, OFFSET, SUM, WIDE,
            )  # fmt: skip
        else:
            stream_norm(
                partial_ptr, weight_ptr,
                grad_y_row, grad_total_row, x_row, grad_x_row, grad_residual_row,
                rstd, branch_scale, total_scale, row < num_rows, all_cols,
                N, ROWS, BLOCK, SHARE, OFFSET, SUM, WIDE,
            )  # fmt: skip
    if HELD and partial_ptr is not None:
        for chunk in tl.static_range(CHUNKS):
            store_partial(partial_ptr, sums[chunk], chunk * BLOCK + all_cols, N)


class Sum(NamedTuple):
    """The residual sum that a norm stands beside.

    Attributes:
        position: "first" before the norm, "last" after it, "" if there is none.
        scales: its factors; None if there is no sum.
        grad_total: the gradient of a first sum's own result, (..., N) or None.
    """

    position: str = ""
    scales: Scales | None = None
    grad_total: torch.Tensor | None = None


def launch(
    grad_y: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    rstd: torch.Tensor,
    offset: float,
    plan: RoundingPlan,
    output_mask: Sequence[bool],
    *,
    tile: BackwardLaunch | None = None,
    wrap: Callable[[Any], Any] = eager,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """grad_y, x (..., N), weight (N,) or None, rstd (..., 1) -> gradients of x and weight, or None.

    Args:
        grad_y: rows of any strides, any of the four floating types.
        x: the same.
        weight: any of the four types.
        rstd: contiguous, as the norm returns it.
        offset: added to the weight.
        plan: the norm's; its statistic's type, at least float32, is that of the sums.
        output_mask: which of the two gradients are wanted.
        tile: by default the one for this shape and type.
        wrap: how a compiler sees the launches; `torch.library.wrap_triton`.
    """
    grad_x = torch.empty_like(x) if output_mask[0] else None
    learned = weight if output_mask[1] else None
    norm = (weight, learned, rstd, offset, plan)
    grad_weight = launch_beside(Sum(), grad_y, x, *norm, (grad_x, None), tile, wrap)
    return grad_x, grad_weight


def launch_beside(
    beside: Sum,
    grad_y: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    learned: torch.Tensor | None,
    rstd: torch.Tensor,
    offset: float,
    plan: RoundingPlan,
    results: tuple[torch.Tensor | None, torch.Tensor | None],
    tile: BackwardLaunch | None,
    wrap: Callable[[Any], Any],
) -> torch.Tensor | None:
    """Fills `results`, the gradients of x and residual; returns that of `learned`, the weight."""
    if is_empty(x):
        return no_gradients([learned])[0]
    order = row_order(*results, rstd)
    if order is None:
        dense = tuple(None if r is None else torch.empty_like(r).contiguous() for r in results)
        norm = (weight, learned, rstd.contiguous(), offset, plan)
        operands = (beside, grad_y, x.contiguous())
        grad_weight = launch_beside(*operands, *norm, dense, tile, wrap)
        copied_into(results, dense)
        return grad_weight
    like = next((result for result in results if result is not None), x.contiguous())
    x, stride_x = addressed_by_one_stride(x, order, like)
    grad_y, stride_grad_y = addressed_by_one_stride(grad_y, order, like)
    grad_total, stride_grad_total = beside.grad_total, 0
    if grad_total is not None:
        grad_total, stride_grad_total = addressed_by_one_stride(grad_total, order, like)
    dtype = torch.promote_types(plan.compute, torch.float32)
    tile = tile or launch_for(x, grad_y, plan, operands=2 if grad_total is None else 3)
    partial = partial_sums(learned, tile, dtype)
    scale_tensors = (None, None) if beside.scales is None else beside.scales[:2]
    with device_of(x, wrap):
        wrap(rms_norm_backward_kernel)[(tile.programs,)](
            grad_y,
            grad_total,
            x,
            as_vector(weight),
            rstd,
            *scale_tensors,
            *results,
            partial,
            num_rows(x),
            stride_grad_y,
            stride_grad_total,
            stride_x,
            N=x.shape[-1],
            **tile.constants(),
            SHARE=1.0 if plan.mean == "sum" else 1.0 / x.shape[-1],
            OFFSET=offset_of(weight, offset),
            **scale_constants(beside.scales),
            SUM=beside.position,
            WIDE=NAMES[dtype],
            num_warps=tile.num_warps,
        )
        return sum_partials([partial], [learned], wrap)[0]
