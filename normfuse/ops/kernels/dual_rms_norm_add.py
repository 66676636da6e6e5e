"""Two norms, their sum, a norm and the residual sum over rows; on request, the norm of that.

    branch = x_1 * rstd_1 * (weight_1 + offset_1) + x_2 * rstd_2 * (weight_2 + offset_2)
    total  = (residual + branch * rstd_3 * (weight_3 + offset_3) * branch_scale) * total_scale
    y      = total * rstd_4 * (weight_4 + offset_4)

Backward, with norm'(g; x) = rstd * (g - unit * mean(g * unit)) and unit = x * rstd:

    grad_residual = grad_total * total_scale
    grad_normed   = grad_residual * branch_scale
    grad_branch   = norm'(grad_normed * (weight_3 + offset_3); branch)
    grad_x_i      = norm'(grad_branch * (weight_i + offset_i); x_i)       for 1 and 2
    grad_weight_3 = sum over rows of grad_normed * unit_3
    grad_weight_i = sum over rows of grad_branch * unit_i                 for 1 and 2
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
    row_of,
    says,
    store_tile,
    tile_at,
)
from normfuse.ops.kernels.constants import NAMES, SumTypes, norm_constants
from normfuse.ops.kernels.row import (
    load_scale,
    normalised,
    residual_sum,
    root_of,
    roots_of_two,
    rounded,
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
    known,
    num_rows,
    row_order,
)
from normfuse.ops.kernels.tile import Launch, device_of, eager

if TYPE_CHECKING:
    from normfuse.ops.residual_sum import Scales
    from normfuse.ops.rounding import RoundingPlan


@triton.jit
def _branch(
    xs_1,
    xs_2,
    weights_1,
    weights_2,
    x_1_ptr,
    x_2_ptr,
    weight_1_ptr,
    weight_2_ptr,
    root_1,
    root_2,
    is_row,
    index,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    READS: tl.constexpr,
    BRANCH: tl.constexpr,
    OFFSET_1: tl.constexpr,
    PLAN_1: tl.constexpr,
    OFFSET_2: tl.constexpr,
    PLAN_2: tl.constexpr,
):
    """norm_1(x_1) + norm_2(x_2) of a tile, in the promoted type BRANCH."""
    x_1 = tile_at(xs_1, x_1_ptr, is_row, index, N, BLOCK, READS, "held")
    x_2 = tile_at(xs_2, x_2_ptr, is_row, index, N, BLOCK, READS, "held")
    weight_1 = tile_at(weights_1, weight_1_ptr, None, index, N, BLOCK, READS, "ahead")
    weight_2 = tile_at(weights_2, weight_2_ptr, None, index, N, BLOCK, READS, "ahead")
    branch_1 = normalised(x_1, root_1, weight_1, OFFSET_1, PLAN_1, True)
    branch_2 = normalised(x_2, root_2, weight_2, OFFSET_2, PLAN_2, True)
    return rounded(rounded(branch_1, BRANCH) + rounded(branch_2, BRANCH), BRANCH)  # eager's add


@triton.jit
def _total(
    branch,
    residuals,
    weights,
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
    weight = tile_at(weights, weight_ptr, None, index, N, BLOCK, READS, "ahead")
    normed = normalised(branch, root, weight, OFFSET, PLAN, True)
    residual = tile_at(residuals, residual_ptr, is_row, index, N, BLOCK, READS, "ahead")
    return residual_sum(normed, residual, branch_scale, total_scale, BRANCH_SCALE, TOTAL_SCALE, SUM)


@triton.jit
def dual_rms_norm_add_kernel(
    x_1_ptr,
    x_2_ptr,
    residual_ptr,
    weight_1_ptr,
    weight_2_ptr,
    weight_3_ptr,
    weight_4_ptr,
    branch_scale_ptr,
    total_scale_ptr,
    y_ptr,
    total_ptr,
    rstd_1_ptr,
    rstd_2_ptr,
    rstd_3_ptr,
    rstd_4_ptr,
    num_rows,
    stride_x_1_row,
    stride_x_2_row,
    stride_residual_row,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    READS: tl.constexpr,
    BRANCH: tl.constexpr,
    BRANCH_SCALE: tl.constexpr,
    TOTAL_SCALE: tl.constexpr,
    SUM: tl.constexpr,
    EPS_1: tl.constexpr,
    OFFSET_1: tl.constexpr,
    PLAN_1: tl.constexpr,
    EPS_2: tl.constexpr,
    OFFSET_2: tl.constexpr,
    PLAN_2: tl.constexpr,
    EPS_3: tl.constexpr,
    OFFSET_3: tl.constexpr,
    PLAN_3: tl.constexpr,
    EPS_4: tl.constexpr,
    OFFSET_4: tl.constexpr,
    PLAN_4: tl.constexpr,
):
    row = row_index(ROWS)
    is_row = row < num_rows
    x_1_ptr += row * stride_x_1_row
    x_2_ptr += row * stride_x_2_row
    residual_ptr += row * stride_residual_row
    y_ptr = row_of(y_ptr, row, N)
    total_ptr = row_of(total_ptr, row, N)
    weight_1_ptr = row_of(weight_1_ptr, row, 0)
    weight_2_ptr = row_of(weight_2_ptr, row, 0)
    weight_3_ptr = row_of(weight_3_ptr, row, 0)
    weight_4_ptr = row_of(weight_4_ptr, row, 0)
    xs_1 = load_tiles(x_1_ptr, is_row, N, BLOCK, READS, "held")
    xs_2 = load_tiles(x_2_ptr, is_row, N, BLOCK, READS, "held")
    residuals = load_tiles(residual_ptr, is_row, N, BLOCK, READS, "ahead")
    weights_1 = load_tiles(weight_1_ptr, None, N, BLOCK, READS, "ahead")
    weights_2 = load_tiles(weight_2_ptr, None, N, BLOCK, READS, "ahead")
    weights_3 = load_tiles(weight_3_ptr, None, N, BLOCK, READS, "ahead")
    branch_scale = load_scale(branch_scale_ptr)
    total_scale = load_scale(total_scale_ptr)
    sums_1 = zero_sums(ROWS, BLOCK, PLAN_1)
    sums_2 = zero_sums(ROWS, BLOCK, PLAN_2)
    sums_3 = zero_sums(ROWS, BLOCK, PLAN_3)
    if says(READS, "held"):
        for index in tl.static_range(num_tiles(N, BLOCK)):
            sums_1 += squares(widened(xs_1[index]), PLAN_1)
            sums_2 += squares(widened(xs_2[index]), PLAN_2)
        root_1, root_2 = roots_of_two(sums_1, sums_2, N, EPS_1, PLAN_1, EPS_2, PLAN_2)
        xs_1, xs_2, residuals = fenced(xs_1, READS), fenced(xs_2, READS), fenced(residuals, READS)
        weights_1, weights_2 = fenced(weights_1, READS), fenced(weights_2, READS)
        branches = ()
        for index in tl.static_range(num_tiles(N, BLOCK)):
            branch = _branch(
                xs_1, xs_2, weights_1, weights_2, x_1_ptr, x_2_ptr, weight_1_ptr, weight_2_ptr,
                root_1, root_2, is_row, index,
                N, BLOCK, READS, BRANCH, OFFSET_1, PLAN_1, OFFSET_2, PLAN_2,
            )  # fmt: skip
            branches = branches + (narrowed(branch, BRANCH),)
            sums_3 += squares(branch, PLAN_3)
        root_3 = root_of(sums_3, None, N, EPS_3, PLAN_3)
        branches, weights_3 = fenced(branches, READS), fenced(weights_3, READS)
        weights_4 = load_tiles(weight_4_ptr, None, N, BLOCK, READS, "ahead")
        if y_ptr is not None:
            sums_4 = zero_sums(ROWS, BLOCK, PLAN_4)
        totals = ()
        for index in tl.static_range(num_tiles(N, BLOCK)):
            branch = widened(branches[index])
            total = _total(
                branch, residuals, weights_3, residual_ptr, weight_3_ptr,
                root_3, branch_scale, total_scale, is_row, index,
                N, BLOCK, READS, BRANCH_SCALE, TOTAL_SCALE, SUM, OFFSET_3, PLAN_3,
            )  # fmt: skip
            store_tile(total_ptr, total, is_row, index, N, BLOCK)
            if y_ptr is not None:
                totals = totals + (narrowed(total, step(SUM, "total")),)
                sums_4 += squares(total, PLAN_4)
        if y_ptr is not None:
            root_4 = root_of(sums_4, None, N, EPS_4, PLAN_4)
            totals, weights_4 = fenced(totals, READS), fenced(weights_4, READS)
            for index in tl.static_range(num_tiles(N, BLOCK)):
                weight_4 = tile_at(weights_4, weight_4_ptr, None, index, N, BLOCK, READS, "ahead")
                y = normalised(widened(totals[index]), root_4, weight_4, OFFSET_4, PLAN_4, False)
                store_tile(y_ptr, y, is_row, index, N, BLOCK)
    else:  # a loop at run time: unrolled, so many tiles would run out of registers
        for index in range(num_tiles(N, BLOCK)):
            x_1 = tile_at(xs_1, x_1_ptr, is_row, index, N, BLOCK, READS, "held")
            x_2 = tile_at(xs_2, x_2_ptr, is_row, index, N, BLOCK, READS, "held")
            sums_1 += squares(x_1, PLAN_1)
            sums_2 += squares(x_2, PLAN_2)
        root_1, root_2 = roots_of_two(sums_1, sums_2, N, EPS_1, PLAN_1, EPS_2, PLAN_2)
        for index in range(num_tiles(N, BLOCK)):
            branch = _branch(
                xs_1, xs_2, weights_1, weights_2, x_1_ptr, x_2_ptr, weight_1_ptr, weight_2_ptr,
                root_1, root_2, is_row, index,
                N, BLOCK, READS, BRANCH, OFFSET_1, PLAN_1, OFFSET_2, PLAN_2,
            )  # fmt: skip
            sums_3 += squares(branch, PLAN_3)
        root_3 = root_of(sums_3, None, N, EPS_3, PLAN_3)
        if y_ptr is not None:
            sums_4 = zero_sums(ROWS, BLOCK, PLAN_4)
        for index in range(num_tiles(N, BLOCK)):
            branch = _branch(
                xs_1, xs_2, weights_1, weights_2, x_1_ptr, x_2_ptr, weight_1_ptr, weight_2_ptr,
                root_1, root_2, is_row, index,
                N, BLOCK, READS, BRANCH, OFFSET_1, PLAN_1, OFFSET_2, PLAN_2,
            )  # fmt: skip
            total = _total(
                branch, residuals, weights_3, residual_ptr, weight_3_ptr,
                root_3, branch_scale, total_scale, is_row, index,
                N, BLOCK, READS, BRANCH_SCALE, TOTAL_SCALE, SUM, OFFSET_3, PLAN_3,
            )  # fmt: skip
            store_tile(total_ptr, total, is_row, index, N, BLOCK)
            if y_ptr is not None:
                sums_4 += squares(total, PLAN_4)
        if y_ptr is not None:
            root_4 = root_of(sums_4, None, N, EPS_4, PLAN_4)
            for index in range(num_tiles(N, BLOCK)):
                branch = _branch(
                    xs_1, xs_2, weights_1, weights_2, x_1_ptr, x_2_ptr, weight_1_ptr, weight_2_ptr,
                    root_1, root_2, is_row, index,
                    N, BLOCK, READS, BRANCH, OFFSET_1, PLAN_1, OFFSET_2, PLAN_2,
                )  # fmt: skip
                total = _total(
                    branch, residuals, weights_3, residual_ptr, weight_3_ptr,
                    root_3, branch_scale, total_scale, is_row, index,
                    N, BLOCK, READS, BRANCH_SCALE, TOTAL_SCALE, SUM, OFFSET_3, PLAN_3,
                )  # fmt: skip
                weight_4 = tile_at((), weight_4_ptr, None, index, N, BLOCK, READS, "ahead")
                y = normalised(total, root_4, weight_4, OFFSET_4, PLAN_4, False)
                store_tile(y_ptr, y, is_row, index, N, BLOCK)
    store_inverse_root(rstd_1_ptr, root_1, row, num_rows, PLAN_1)
    store_inverse_root(rstd_2_ptr, root_2, row, num_rows, PLAN_2)
    store_inverse_root(rstd_3_ptr, root_3, row, num_rows, PLAN_3)
    if y_ptr is not None:
        store_inverse_root(rstd_4_ptr, root_4, row, num_rows, PLAN_4)


def launch(
    x_1: torch.Tensor,
    x_2: torch.Tensor,
    residual: torch.Tensor,
    weights: Sequence[torch.Tensor | None],
    scales: Scales,
    norms: Sequence[tuple[float, float, RoundingPlan]],
    *,
    stored: Sequence[bool] | None = None,
    tile: Launch | None = None,
    wrap: Callable[[Any], Any] = eager,
) -> tuple[torch.Tensor | None, ...]:
    """x_1, x_2, residual (..., N) -> [y,] total (..., N), an rstd (..., 1) for each norm.

    Args:
        x_1: one branch.
        x_2: the other.
        residual: the residual stream.
        weights: (N,) or None, three, or four for the norm of the sum as well.
        scales: the factors of the residual sum.
        norms: (eps, offset, plan), as many as weights. The fourth asks for y, in its `plan.out`.
        stored: which results are asked for; the others, but never the first, are None.
        tile: as in `rms_norm.launch`.
        wrap: as in `rms_norm.launch`.
    """
    plans = [plan for _, _, plan in norms]
    branch = torch.promote_types(plans[0].out, plans[1].out)
    types = SumTypes.of(plans[2].out, residual.dtype, scales)
    results = _empty_results(x_1, x_2, residual, plans, types.total, stored)
    if is_empty(x_1):
        return results
    order = row_order(*results)
    if order is None:
        again = partial(launch, stored=stored, tile=tile, wrap=wrap)
        dense = x_1.contiguous(), x_2.contiguous(), residual.contiguous()
        return copied_into(results, again(*dense, weights, scales, norms))
    like = results[0]
    x_1, stride_x_1 = addressed_by_one_stride(x_1, order, like)
    x_2, stride_x_2 = addressed_by_one_stride(x_2, order, like)
    residual, stride_residual = addressed_by_one_stride(residual, order, like)
    op = "dual_rms_norm_add" if len(norms) == 3 else "dual_rms_norm_add_rms_norm"
    tile = tile or Launch.for_shape(x_1.shape[-1], types.total, plans[0].compute, op=op)
    has_y = len(norms) == 4
    constants = dict.fromkeys(("EPS_4", "OFFSET_4", "PLAN_4"))
    for index, (eps, offset, plan) in enumerate(norms, 1):
        constants |= norm_constants(plan, eps, offset, f"_{index}")
    with device_of(x_1, wrap):
        wrap(dual_rms_norm_add_kernel)[tile.grid(num_rows(x_1))](
            x_1,
            x_2,
            residual,
            *(as_vector(weight) for weight in weights),
            *(() if has_y else (None,)),
            scales.branch_tensor,
            scales.total_tensor,
            *(results if has_y else (None, *results, None)),
            num_rows(x_1),
            stride_x_1,
            stride_x_2,
            stride_residual,
            **tile.constants(x_1.shape[-1], num_rows(x_1)),
            BRANCH=NAMES[branch],
            **types.constants(scales),
            **constants,
            num_warps=tile.num_warps,
        )
    return results


def _empty_results(
    x_1: torch.Tensor,
    x_2: torch.Tensor,
    residual: torch.Tensor,
    plans: Sequence[RoundingPlan],
    total_dtype: torch.dtype,
    stored: Sequence[bool] | None,
) -> tuple[torch.Tensor | None, ...]:
    """The results, laid out as eager's; None for those that are not stored."""
    branch = x_1
    if not all(known(a == b) for a, b in zip(x_1.stride(), x_2.stride(), strict=True)):
        branch = empty_sum(x_2, torch.empty_like(x_1), x_1.dtype, is_fresh=True)
    dtypes = [total_dtype] if len(plans) == 3 else [plans[3].out, total_dtype]
    flags = [True] * (len(dtypes) + len(plans)) if stored is None else [True, *stored[1:]]
    first = empty_sum(branch, residual, dtypes[0], is_fresh=True)
    column = (*first.shape[:-1], 1)
    empty = [
        *(partial(torch.empty_like, first, dtype=dtype) for dtype in dtypes[1:]),
        *(partial(first.new_empty, column, dtype=plan.compute) for plan in plans),
    ]
    others = (make() if flag else None for make, flag in zip(empty, flags[1:], strict=True))
    return first, *others
