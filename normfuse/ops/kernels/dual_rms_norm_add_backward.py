"""The gradients of two norms, their sum, a norm and the residual sum; on request, of one more norm.

With norm'(g; x) = rstd * (g - unit * mean(g * unit)) and unit = x * rstd:

    grad          = norm'(grad_y * (weight_4 + offset_4); total) + grad_total
    grad_residual = grad * total_scale
    grad_normed   = grad_residual * branch_scale
    grad_branch   = norm'(grad_normed * (weight_3 + offset_3); branch)
    grad_x_i      = norm'(grad_branch * (weight_i + offset_i); x_i)       for 1 and 2
    grad_weight_i = sum over rows of grad_branch * unit_i                 for 1 and 2
    grad_weight_3 = sum over rows of grad_normed * unit_3
    grad_weight_4 = sum over rows of grad_y * unit_4

The branch, norm_1(x_1) + norm_2(x_2), is formed again with eager's roundings. Operands are read
once; rows too wide for registers once for each reduction, from the cache but for the first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
import triton
import triton.language as tl

from normfuse.ops.kernels.branch_backward import branch_of, grad_of_sum, sums_of_two
from normfuse.ops.kernels.chunks import narrowed, row_of
from normfuse.ops.kernels.constants import NAMES, plan_text
from normfuse.ops.kernels.row import row_of_tile
from normfuse.ops.kernels.row_backward import (
    load_rstd,
    load_scale,
    norm_gradient,
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
from normfuse.ops.kernels.stream_dual_backward import stream_dual
from normfuse.ops.kernels.sums_backward import load_weights, store_sums, zero_sums
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
    sums_1, sums_2, sums_3, sums_4, weights_1, weights_2, weights_3, weights_4,
    grad_y_ptr, grad_total_ptr, x_1_ptr, x_2_ptr, total_ptr,
    grad_x_1_ptr, grad_x_2_ptr, grad_residual_ptr,
    rstd_1, rstd_2, rstd_3, rstd_4, branch_scale, total_scale, is_row, all_cols,
    N: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, CHUNKS: tl.constexpr,
    OFFSET_1: tl.constexpr, OFFSET_2: tl.constexpr, OFFSET_3: tl.constexpr, OFFSET_4: tl.constexpr,
    PLAN_1: tl.constexpr, PLAN_2: tl.constexpr, BRANCH: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One tile of rows, read once; returns the sums of the weights' gradients with its own."""
    TYPE: tl.constexpr = wide_type(WIDE)
    grads_y = ()
    totals = ()
    if grad_y_ptr is not None:
        products_4 = zeros(ROWS, BLOCK, WIDE)
        for chunk in tl.static_range(CHUNKS):
            cols = chunk * BLOCK + all_cols
            mask = is_row & (cols < N)
            grad_y = tl.load(grad_y_ptr + cols, mask=mask, other=0.0)
            total = tl.load(total_ptr + cols, mask=mask, other=0.0)
            grads_y += (grad_y,)  # held in the narrow type in which they come
            totals += (total,)
            grad_unit = weighted(grad_y.to(TYPE), weights_4[chunk], OFFSET_4, WIDE)
            products_4 += grad_unit * total.to(TYPE)
        mean_4 = tl.sum(products_4, axis=1, keep_dims=True) * rstd_4 * (1.0 / N)
    products_3 = zeros(ROWS, BLOCK, WIDE)
    added_3 = ()
    added_4 = ()
    xs_1 = ()
    xs_2 = ()
    branches = ()
    grads = ()
    for chunk in tl.static_range(CHUNKS):
        cols = chunk * BLOCK + all_cols
        mask = is_row & (cols < N)
        if grad_y_ptr is not None:
            grad_y, total = grads_y[chunk].to(TYPE), totals[chunk].to(TYPE)
            grad_residual = grad_of_sum(
                grad_y, total, weights_4[chunk], rstd_4, mean_4, grad_total_ptr, total_scale,
                cols, mask, OFFSET_4, WIDE,
            )  # fmt: skip
            if len(sums_4) > 0:
                added_4 += (sums_4[chunk] + grad_y * (total * rstd_4),)
        else:
            grad_residual = grad_of_sum(
                None, None, None, None, None, grad_total_ptr, total_scale, cols, mask, 0.0, WIDE
            )
        if grad_residual_ptr is not None:
            tl.store(grad_residual_ptr + cols, grad_residual, mask=mask)
        grad = grad_residual * branch_scale
        x_1 = tl.load(x_1_ptr + cols, mask=mask, other=0.0)
        x_2 = tl.load(x_2_ptr + cols, mask=mask, other=0.0)
        branch = branch_of(
            x_1, x_2, weights_1[chunk], weights_2[chunk], rstd_1, rstd_2,
            OFFSET_1, PLAN_1, OFFSET_2, PLAN_2, BRANCH,
        )  # fmt: skip
        if len(sums_3) > 0:
            added_3 += (sums_3[chunk] + grad * (branch.to(TYPE) * rstd_3),)
        grad_unit = weighted(grad, weights_3[chunk], OFFSET_3, WIDE)
        products_3 += grad_unit * branch.to(TYPE)
        xs_1 += (x_1,)
        xs_2 += (x_2,)
        branches += (narrowed(branch, BRANCH),)
        grads += (grad_unit,)
    mean_3 = tl.sum(products_3, axis=1, keep_dims=True) * rstd_3 * (1.0 / N)
    products_1 = zeros(ROWS, BLOCK, WIDE)
    products_2 = zeros(ROWS, BLOCK, WIDE)
    added_1 = ()
    added_2 = ()
    grads_branch = ()
    for chunk in tl.static_range(CHUNKS):
        unit_1, unit_2 = xs_1[chunk].to(TYPE) * rstd_1, xs_2[chunk].to(TYPE) * rstd_2
        unit_3 = branches[chunk].to(TYPE) * rstd_3
        grad = norm_gradient(grads[chunk], unit_3, rstd_3, mean_3)
        grads_branch += (grad,)
        if len(sums_1) > 0:
            added_1 += (sums_1[chunk] + grad * unit_1,)
        if len(sums_2) > 0:
            added_2 += (sums_2[chunk] + grad * unit_2,)
        products_1 += weighted(grad, weights_1[chunk], OFFSET_1, WIDE) * unit_1
        products_2 += weighted(grad, weights_2[chunk], OFFSET_2, WIDE) * unit_2
    sum_1, sum_2 = sums_of_two(products_1, products_2)
    for chunk in tl.static_range(CHUNKS):
        cols = chunk * BLOCK + all_cols
        mask = is_row & (cols < N)
        if grad_x_1_ptr is not None:
            grad_unit = weighted(grads_branch[chunk], weights_1[chunk], OFFSET_1, WIDE)
            unit = xs_1[chunk].to(TYPE) * rstd_1
            grad_x = norm_gradient(grad_unit, unit, rstd_1, sum_1 * (1.0 / N))
            tl.store(grad_x_1_ptr + cols, grad_x, mask=mask)
        if grad_x_2_ptr is not None:
            grad_unit = weighted(grads_branch[chunk], weights_2[chunk], OFFSET_2, WIDE)
            unit = xs_2[chunk].to(TYPE) * rstd_2
            grad_x = norm_gradient(grad_unit, unit, rstd_2, sum_2 * (1.0 / N))
            tl.store(grad_x_2_ptr + cols, grad_x, mask=mask)
    return added_1, added_2, added_3, added_4


@triton.jit
def dual_rms_norm_add_backward_kernel(
    grad_y_ptr, grad_total_ptr, x_1_ptr, x_2_ptr, total_ptr,
    weight_1_ptr, weight_2_ptr, weight_3_ptr, weight_4_ptr,
    rstd_1_ptr, rstd_2_ptr, rstd_3_ptr, rstd_4_ptr, branch_scale_ptr, total_scale_ptr,
    grad_x_1_ptr, grad_x_2_ptr, grad_residual_ptr,
    partial_1_ptr, partial_2_ptr, partial_3_ptr, partial_4_ptr,
    num_rows, stride_grad_y_row, stride_grad_total_row, stride_x_1_row, stride_x_2_row,
    stride_total_row,
    N: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, CHUNKS: tl.constexpr,
    HELD: tl.constexpr, STAGES: tl.constexpr,
    OFFSET_1: tl.constexpr, OFFSET_2: tl.constexpr, OFFSET_3: tl.constexpr, OFFSET_4: tl.constexpr,
    PLAN_1: tl.constexpr, PLAN_2: tl.constexpr, BRANCH: tl.constexpr,
    BRANCH_SCALE: tl.constexpr, TOTAL_SCALE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Each program takes every num_programs-th tile of rows."""
    branch_scale = load_scale(branch_scale_ptr, BRANCH_SCALE, WIDE)
    total_scale = load_scale(total_scale_ptr, TOTAL_SCALE, WIDE)
    all_cols = tl.arange(0, BLOCK)[None, :]
    if HELD:
        sums_1 = zero_sums(partial_1_ptr, ROWS, BLOCK, CHUNKS, WIDE)
        sums_2 = zero_sums(partial_2_ptr, ROWS, BLOCK, CHUNKS, WIDE)
        sums_3 = zero_sums(partial_3_ptr, ROWS, BLOCK, CHUNKS, WIDE)
        sums_4 = zero_sums(partial_4_ptr, ROWS, BLOCK, CHUNKS, WIDE)
        weights_1 = load_weights(x_1_ptr, weight_1_ptr, all_cols, N, ROWS, BLOCK, CHUNKS)
        weights_2 = load_weights(x_2_ptr, weight_2_ptr, all_cols, N, ROWS, BLOCK, CHUNKS)
        weights_3 = load_weights(rstd_3_ptr, weight_3_ptr, all_cols, N, ROWS, BLOCK, CHUNKS)
        weights_4 = load_weights(grad_y_ptr, weight_4_ptr, all_cols, N, ROWS, BLOCK, CHUNKS)
    num_tiles = tl.cdiv(num_rows, ROWS)
    for tile in tl.range(tl.program_id(0), num_tiles, tl.num_programs(0), num_stages=STAGES):
        row = row_of_tile(tile, ROWS)
        rstd_1 = load_rstd(rstd_1_ptr, row, num_rows, WIDE)
        rstd_2 = load_rstd(rstd_2_ptr, row, num_rows, WIDE)
        rstd_3 = load_rstd(rstd_3_ptr, row, num_rows, WIDE)
        # Never read where there is no fourth norm.
        rstd_4 = rstd_3 if rstd_4_ptr is None else load_rstd(rstd_4_ptr, row, num_rows, WIDE)
        grad_y_row = row_of(grad_y_ptr, row, stride_grad_y_row)
        grad_total_row = row_of(grad_total_ptr, row, stride_grad_total_row)
        x_1_row = x_1_ptr + row * stride_x_1_row
        x_2_row = x_2_ptr + row * stride_x_2_row
        total_row = row_of(total_ptr, row, stride_total_row)
        grad_x_1_row = row_of(grad_x_1_ptr, row, N)
        grad_x_2_row = row_of(grad_x_2_ptr, row, N)
        grad_residual_row = row_of(grad_residual_ptr, row, N)
        if HELD:
            sums_1, sums_2, sums_3, sums_4 = _held_row(
                sums_1, sums_2, sums_3, sums_4, weights_1, weights_2, weights_3, weights_4,
                grad_y_row, grad_total_row, x_1_row, x_2_row, total_row,
                grad_x_1_row, grad_x_2_row, grad_residual_row,
                rstd_1, rstd_2, rstd_3, rstd_4, branch_scale, total_scale, row < num_rows, all_cols,
                N, ROWS, BLOCK, CHUNKS, OFFSET_1, OFFSET_2, OFFSET_3, OFFSET_4,
                PLAN_1, PLAN_2, BRANCH, WIDE,
            )  # fmt: skip
        else:
            stream_dual(
                partial_1_ptr, partial_2_ptr, partial_3_ptr, partial_4_ptr,
                weight_1_ptr, weight_2_ptr, weight_3_ptr, weight_4_ptr,
                grad_y_row, grad_total_row, x_1_row, x_2_row, total_row,
                grad_x_1_row, grad_x_2_row, grad_residual_row,
                rstd_1, rstd_2, rstd_3, rstd_4, branch_scale, total_scale, row < num_rows, all_cols,
                N, ROWS, BLOCK, OFFSET_1, OFFSET_2, OFFSET_3, OFFSET_4,
                PLAN_1, PLAN_2, BRANCH, WIDE,
            )  # fmt: skip
    if HELD:
        store_sums(partial_1_ptr, sums_1, all_cols, N, BLOCK, CHUNKS)
        store_sums(partial_2_ptr, sums_2, all_cols, N, BLOCK, CHUNKS)
        store_sums(partial_3_ptr, sums_3, all_cols, N, BLOCK, CHUNKS)
        store_sums(partial_4_ptr, sums_4, all_cols, N, BLOCK, CHUNKS)


def launch(
    operands: Sequence[torch.Tensor | None],
    norms: Sequence[Norm],
    scales: Scales,
    residual_dtype: torch.dtype,
    output_mask: Sequence[bool],
    *,
    tile: BackwardLaunch | None = None,
    wrap: Callable[[Any], Any] = eager,
) -> list[torch.Tensor | None]:
    """grad_y, grad_total, x_1, x_2, total (..., N) -> gradients of x_1, x_2, residual and weights.

    `norms` holds (weight, rstd, offset, plan) of three norms, or of four if there are grad_y and
    total; the rest as in `rms_norm_backward.launch`.
    """
    x_1, x_2 = (cast(torch.Tensor, x) for x in operands[2:4])
    like = x_1 if operands[4] is None else operands[4]
    results = [
        torch.empty_like(value, dtype=dtype) if is_wanted else None
        for value, dtype, is_wanted in zip(
            (x_1, x_2, like), (x_1.dtype, x_2.dtype, residual_dtype), output_mask, strict=False
        )
    ]
    learned = [
        norm[0] if is_wanted else None
        for norm, is_wanted in zip(norms, output_mask[3:], strict=True)
    ]
    if is_empty(x_1):
        return [*results, *no_gradients(learned)]
    return [*results, *_launch(operands, norms, learned, scales, results, tile, wrap)]


def _launch(
    operands: Sequence[torch.Tensor | None],
    norms: Sequence[Norm],
    learned: Sequence[torch.Tensor | None],
    scales: Scales,
    results: Sequence[torch.Tensor | None],
    tile: BackwardLaunch | None,
    wrap: Callable[[Any], Any],
) -> list[torch.Tensor | None]:
    """Fills `results`; returns the gradients of the weights that learn."""
    x_1, plans = cast(torch.Tensor, operands[2]), [norm[3] for norm in norms]
    rstds = [norm[1] for norm in norms]
    order = row_order(*results, *rstds)
    if order is None:
        dense = [None if r is None else torch.empty_like(r).contiguous() for r in results]
        operands = [None if o is None else o.contiguous() for o in operands]
        grads = _launch(operands, norms, learned, scales, dense, tile, wrap)
        copied_into(results, dense)
        return grads
    like = next((result for result in results if result is not None), x_1.contiguous())
    pairs = [
        (None, 0) if operand is None else addressed_by_one_stride(operand, order, like)
        for operand in operands
    ]
    present = [operand for operand in operands if operand is not None]
    widest = max(present, key=lambda operand: operand.dtype.itemsize)
    plan = max(plans, key=lambda plan: plan.compute.itemsize)
    dtype = torch.promote_types(plan.compute, torch.float32)
    tile = tile or launch_for(x_1, widest, plan, norms=len(norms), operands=len(present))
    partials = [partial_sums(weight, tile, dtype) for weight in learned]
    absent = [None] * (4 - len(norms))
    offsets = [offset_of(weight, offset) for weight, _, offset, _ in norms] + absent
    with device_of(x_1, wrap):
        wrap(dual_rms_norm_add_backward_kernel)[(tile.programs,)](
            *(operand for operand, _ in pairs),
            *([as_vector(norm[0]) for norm in norms] + absent),
            *(rstds + absent),
            *scales[:2],
            *results,
            *(partials + absent),
            *(num_rows(x_1), *(stride for _, stride in pairs)),
            N=x_1.shape[-1],
            **tile.constants(),
            **{f"OFFSET_{number}": offset for number, offset in enumerate(offsets, 1)},
            PLAN_1=plan_text(plans[0]),
            PLAN_2=plan_text(plans[1]),
            BRANCH=NAMES[torch.promote_types(plans[0].out, plans[1].out)],
            **scale_constants(scales),
            WIDE=NAMES[dtype],
            num_warps=tile.num_warps,
        )
        return sum_partials(partials, learned, wrap)
