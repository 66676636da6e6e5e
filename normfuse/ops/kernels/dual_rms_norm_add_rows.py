"""The kernel of `dual_rms_norm_add`: what a program does with its rows."""

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
    residual = tile_at(residuals, residual_ptr, is_row, index, N, BLOCK, READS, "beside")
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
    residuals = load_tiles(residual_ptr, is_row, N, BLOCK, READS, "beside")
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
            store_tile(total_ptr, total, is_row, index, N, BLOCK, READS)
            if y_ptr is not None:
                totals = totals + (narrowed(total, step(SUM, "total")),)
                sums_4 += squares(total, PLAN_4)
        if y_ptr is not None:
            root_4 = root_of(sums_4, None, N, EPS_4, PLAN_4)
            totals, weights_4 = fenced(totals, READS), fenced(weights_4, READS)
            for index in tl.static_range(num_tiles(N, BLOCK)):
                weight_4 = tile_at(weights_4, weight_4_ptr, None, index, N, BLOCK, READS, "ahead")
                y = normalised(widened(totals[index]), root_4, weight_4, OFFSET_4, PLAN_4, False)
                store_tile(y_ptr, y, is_row, index, N, BLOCK, READS)
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
            store_tile(total_ptr, total, is_row, index, N, BLOCK, READS)
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
                store_tile(y_ptr, y, is_row, index, N, BLOCK, READS)
    store_inverse_root(rstd_1_ptr, root_1, row, num_rows, PLAN_1)
    store_inverse_root(rstd_2_ptr, root_2, row, num_rows, PLAN_2)
    store_inverse_root(rstd_3_ptr, root_3, row, num_rows, PLAN_3)
    if y_ptr is not None:
        store_inverse_root(rstd_4_ptr, root_4, row, num_rows, PLAN_4)
