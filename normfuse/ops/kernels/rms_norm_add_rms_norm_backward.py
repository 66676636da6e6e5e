"""The gradients of the sandwich over rows, in one pass: RMSNorm, residual add, RMSNorm.

With norm'(g; x) = rstd * (g - unit * mean(g * unit)) and unit = x * rstd:

    grad          = norm'(grad_y * (weight_2 + offset_2); total) + grad_total
    grad_residual = grad * total_scale
    grad_branch   = grad_residual * branch_scale
    grad_x        = norm'(grad_branch * (weight_1 + offset_1); x)
    grad_weight_1 = sum over rows of grad_branch * unit_1
    grad_weight_2 = sum over rows of grad_y * unit_2

Operands are read once; rows too wide for registers three times, twice from the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
import triton
import triton.language as tl

from normfuse.ops.kernels.constants import NAMES
from normfuse.ops.kernels.row import row_of_tile
from normfuse.ops.kernels.row_backward import (
    load_held_weight,
    load_rstd,
    load_scale,
    load_wide,
    norm_gradient,
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
from normfuse.ops.kernels.stream_backward import stream_sandwich
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

Norm = tuple[torch.Tensor | None, torch.Tensor, float, "RoundingPlan"]


@triton.jit
def _held_row(
    sums_1, sums_2, weights_1, weights_2,
    grad_y_ptr, grad_total_ptr, x_ptr, total_ptr, grad_x_ptr, grad_residual_ptr,
    rstd_1, rstd_2, branch_scale, total_scale, is_row, all_cols,
    N: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, CHUNKS: tl.constexpr,
    OFFSET_1: tl.constexpr, OFFSET_2: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One tile of rows, read once; returns the sums of both weights' gradients with its own."""
    TYPE: tl.constexpr = wide_type(WIDE)
    products_1 = zeros(ROWS, BLOCK, WIDE)
    products_2 = zeros(ROWS, BLOCK, WIDE)
    grads = ()
    totals = ()
    for chunk in tl.static_range(CHUNKS):
        cols = chunk * BLOCK + all_cols
        mask = is_row & (cols < N)
        grad = tl.load(grad_y_ptr + cols, mask=mask, other=0.0)
        total = tl.load(total_ptr + cols, mask=mask, other=0.0)
        grads += (grad,)  # held in the narrow type in which they come
        totals += (total,)
        products_2 += weighted(grad.to(TYPE), weights_2[chunk], OFFSET_2, WIDE) * total.to(TYPE)
    mean_2 = tl.sum(products_2, axis=1, keep_dims=True) * rstd_2 * (1.0 / N)
    added_1 = ()
    added_2 = ()
    grad_units = ()
    xs = ()
    for chunk in tl.static_range(CHUNKS):
        cols = chunk * BLOCK + all_cols
        mask = is_row & (cols < N)
        unit_2 = totals[chunk].to(TYPE) * rstd_2
        grad_y = grads[chunk].to(TYPE)
        added_2 += (sums_2[chunk] + grad_y * unit_2,)
        grad_unit = weighted(grad_y, weights_2[chunk], OFFSET_2, WIDE)
        grad = norm_gradient(grad_unit, unit_2, rstd_2, mean_2)
        grad_residual = (grad + load_wide(grad_total_ptr, cols, mask, WIDE)) * total_scale
        if grad_residual_ptr is not None:
            tl.store(grad_residual_ptr + cols, grad_residual, mask=mask)
        grad_branch = grad_residual * branch_scale
        x = tl.load(x_ptr + cols, mask=mask, other=0.0)
        unit_1 = x.to(TYPE) * rstd_1
        added_1 += (sums_1[chunk] + grad_branch * unit_1,)
        grad_unit = weighted(grad_branch, weights_1[chunk], OFFSET_1, WIDE)
        grad_units += (grad_unit,)
        xs += (x,)
        products_1 += grad_unit * x.to(TYPE)
    mean_1 = tl.sum(products_1, axis=1, keep_dims=True) * rstd_1 * (1.0 / N)
    for chunk in tl.static_range(CHUNKS):
        cols = chunk * BLOCK + all_cols
        unit_1 = xs[chunk].to(TYPE) * rstd_1
        if grad_x_ptr is not None:
            grad_x = norm_gradient(grad_units[chunk], unit_1, rstd_1, mean_1)
            tl.store(grad_x_ptr + cols, grad_x, mask=is_row & (cols < N))
    return added_1, added_2


@triton.jit
def rms_norm_add_rms_norm_backward_kernel(
    grad_y_ptr, grad_total_ptr, x_ptr, total_ptr,
    weight_1_ptr, weight_2_ptr, rstd_1_ptr, rstd_2_ptr, branch_scale_ptr, total_scale_ptr,
    grad_x_ptr, grad_residual_ptr, partial_1_ptr, partial_2_ptr,
    num_rows, stride_grad_y_row, stride_grad_total_row, stride_x_row, stride_total_row,
    N: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, CHUNKS: tl.constexpr,
    HELD: tl.constexpr, STAGES: tl.constexpr, OFFSET_1: tl.constexpr, OFFSET_2: tl.constexpr,
    BRANCH_SCALE: tl.constexpr, TOTAL_SCALE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Each program takes every num_programs-th tile of rows."""
    branch_scale = load_scale(branch_scale_ptr, BRANCH_SCALE, WIDE)
    total_scale = load_scale(total_scale_ptr, TOTAL_SCALE, WIDE)
    all_cols = tl.arange(0, BLOCK)[None, :]
    sums_1 = ()
    sums_2 = ()
    weights_1 = ()
    weights_2 = ()
    for chunk in tl.static_range(CHUNKS):
        sums_1 += (zeros(ROWS, BLOCK, WIDE),)
        sums_2 += (zeros(ROWS, BLOCK, WIDE),)
        cols = chunk * BLOCK + all_cols
        weights_1 += (load_held_weight(weight_1_ptr, cols, N, ROWS),)
        weights_2 += (load_held_weight(weight_2_ptr, cols, N, ROWS),)
    num_tiles = tl.cdiv(num_rows, ROWS)
    for tile in tl.range(tl.program_id(0), num_tiles, tl.num_programs(0), num_stages=STAGES):
        row = row_of_tile(tile, ROWS)
        rstd_1 = load_rstd(rstd_1_ptr, row, num_rows, WIDE)
        rstd_2 = load_rstd(rstd_2_ptr, row, num_rows, WIDE)
        grad_y_row = grad_y_ptr + row * stride_grad_y_row
        grad_total_row = (
            None if grad_total_ptr is None else grad_total_ptr + row * stride_grad_total_row
        )
        x_row = x_ptr + row * stride_x_row
        total_row = total_ptr + row * stride_total_row
        grad_x_row = None if grad_x_ptr is None else grad_x_ptr + row * N
        grad_residual_row = None if grad_residual_ptr is None else grad_residual_ptr + row * N
        if HELD:
            sums_1, sums_2 = _held_row(
                sums_1, sums_2, weights_1, weights_2,
                grad_y_row, grad_total_row, x_row, total_row, grad_x_row, grad_residual_row,
                rstd_1, rstd_2, branch_scale, total_scale, row < num_rows, all_cols,
                N, ROWS, BLOCK, CHUNKS, OFFSET_1, OFFSET_2, WIDE,
            )  # fmt: skip
        else:
            stream_sandwich(
                partial_1_ptr, partial_2_ptr, weight_1_ptr, weight_2_ptr,
                grad_y_row, grad_total_row, x_row, total_row, grad_x_row, grad_residual_row,
                rstd_1, rstd_2, branch_scale, total_scale, row < num_rows, all_cols,
                N, ROWS, BLOCK, OFFSET_1, OFFSET_2, WIDE,
            )  # fmt: skip
    if HELD:
        for chunk in tl.static_range(CHUNKS):
            cols = chunk * BLOCK + all_cols
            if partial_1_ptr is not None:
                store_partial(partial_1_ptr, sums_1[chunk], cols, N)
            if partial_2_ptr is not None:
                store_partial(partial_2_ptr, sums_2[chunk], cols, N)


def launch(
    grad_y: torch.Tensor,
    grad_total: torch.Tensor | None,
    x: torch.Tensor,
    total: torch.Tensor,
    norms: tuple[Norm, Norm],
    scales: Scales,
    residual_dtype: torch.dtype,
    output_mask: Sequence[bool],
    *,
    tile: BackwardLaunch | None = None,
    wrap: Callable[[Any], Any] = eager,
) -> list[torch.Tensor | None]:
    """grad_y, grad_total, x, total (..., N) -> gradients of x, residual and the two weights.

    `norms` holds (weight, rstd, offset, plan) of each; the rest as in `rms_norm_backward.launch`.
    """
    grad_x = torch.empty_like(x) if output_mask[0] else None
    grad_residual = torch.empty_like(total, dtype=residual_dtype) if output_mask[1] else None
    results = (grad_x, grad_residual)
    learned = [norms[i][0] if output_mask[2 + i] else None for i in range(2)]
    operands = (grad_y, grad_total, x, total)
    if is_empty(x):
        return [*results, *no_gradients(learned)]
    return [*results, *_launch(operands, norms, learned, scales, results, tile, wrap)]


def _launch(
    operands: Sequence[torch.Tensor | None],
    norms: tuple[Norm, Norm],
    learned: Sequence[torch.Tensor | None],
    scales: Scales,
    results: tuple[torch.Tensor | None, ...],
    tile: BackwardLaunch | None,
    wrap: Callable[[Any], Any],
) -> list[torch.Tensor | None]:
    """Fills `results`; returns the gradients of the weights that learn."""
    (weight_1, rstd_1, offset_1, plan_1), (weight_2, rstd_2, offset_2, _) = norms
    x = cast(torch.Tensor, operands[2])
    order = row_order(*results, rstd_1, rstd_2)
    if order is None:
        dense = tuple(None if r is None else torch.empty_like(r).contiguous() for r in results)
        operands = [None if o is None else o.contiguous() for o in operands]
        grads = _launch(operands, norms, learned, scales, dense, tile, wrap)
        copied_into(results, dense)
        return grads
    like = next((result for result in results if result is not None), x.contiguous())
    pairs = [
        (None, 0) if operand is None else addressed_by_one_stride(operand, order, like)
        for operand in operands
    ]
    dtype = torch.promote_types(plan_1.compute, torch.float32)
    tile = tile or launch_for(x, operands[0], plan_1, norms=2, operands=len(operands))
    partials = [partial_sums(weight, tile, dtype) for weight in learned]
    with device_of(x, wrap):
        wrap(rms_norm_add_rms_norm_backward_kernel)[(tile.programs,)](
            *(operand for operand, _ in pairs),
            *map(as_vector, (weight_1, weight_2)),
            *(rstd_1, rstd_2),
            *scales[:2],
            *results,
            *partials,
            *(num_rows(x), *(stride for _, stride in pairs)),
            N=x.shape[-1],
            **tile.constants(),
            OFFSET_1=offset_of(weight_1, offset_1),
            OFFSET_2=offset_of(weight_2, offset_2),
            **scale_constants(scales),
            WIDE=NAMES[dtype],
            num_warps=tile.num_warps,
        )
        return sum_partials(partials, learned, wrap)
