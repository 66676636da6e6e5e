"""Rows of `dual_rms_norm_add_backward` too wide for registers: read once for each reduction.

What such rows add to the gradients of weights is summed in memory, as `stream_backward.py` says.
"""

import triton
import triton.language as tl

from normfuse.ops.kernels.branch_backward import branch_of, grad_of_sum, sums_of_two
from normfuse.ops.kernels.row_backward import (
    add_to_partial,
    load_weight,
    load_wide,
    norm_gradient,
    weighted,
    wide_type,
    zeros,
)


@triton.jit
def _grad_residual(
    grad_y_ptr, grad_total_ptr, total_ptr, weight_ptr, rstd, mean, total_scale, cols, mask,
    N: tl.constexpr, OFFSET: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """A tile of the gradient of the residual."""
    if grad_y_ptr is None:
        grad = grad_of_sum(
            None, None, None, None, None, grad_total_ptr, total_scale, cols, mask, 0.0, WIDE
        )
    else:
        grad = grad_of_sum(
            load_wide(grad_y_ptr, cols, mask, WIDE), load_wide(total_ptr, cols, mask, WIDE),
            load_weight(weight_ptr, cols, N), rstd, mean, grad_total_ptr, total_scale, cols, mask,
            OFFSET, WIDE,
        )  # fmt: skip
    return grad


@triton.jit
def _branch(
    x_1_ptr, x_2_ptr, weight_1_ptr, weight_2_ptr, rstd_1, rstd_2, cols, mask,
    N: tl.constexpr, OFFSET_1: tl.constexpr, OFFSET_2: tl.constexpr,
    PLAN_1: tl.constexpr, PLAN_2: tl.constexpr, BRANCH: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """A tile of the branch."""
    x_1 = tl.load(x_1_ptr + cols, mask=mask, other=0.0)
    x_2 = tl.load(x_2_ptr + cols, mask=mask, other=0.0)
    weight_1, weight_2 = load_weight(weight_1_ptr, cols, N), load_weight(weight_2_ptr, cols, N)
    branch = branch_of(
        x_1, x_2, weight_1, weight_2, rstd_1, rstd_2, OFFSET_1, PLAN_1, OFFSET_2, PLAN_2, BRANCH
    )
    return branch.to(wide_type(WIDE))


@triton.jit
def _store_grad_x(
    partial_ptr, weight_ptr, x_ptr, grad_x_ptr, grad, rstd, mean, cols, mask,
    N: tl.constexpr, OFFSET: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """What a tile adds to the gradients of one branch's norm; `grad` is that of its result."""
    unit = load_wide(x_ptr, cols, mask, WIDE) * rstd
    if partial_ptr is not None:
        add_to_partial(partial_ptr, grad * unit, cols, mask, N)
    if grad_x_ptr is not None:
        grad_unit = weighted(grad, load_weight(weight_ptr, cols, N), OFFSET, WIDE)
        tl.store(grad_x_ptr + cols, norm_gradient(grad_unit, unit, rstd, mean), mask=mask)


@triton.jit
def stream_dual(
    partial_1_ptr, partial_2_ptr, partial_3_ptr, partial_4_ptr,
    weight_1_ptr, weight_2_ptr, weight_3_ptr, weight_4_ptr,
    grad_y_ptr, grad_total_ptr, x_1_ptr, x_2_ptr, total_ptr,
    grad_x_1_ptr, grad_x_2_ptr, grad_residual_ptr,
    rstd_1, rstd_2, rstd_3, rstd_4, branch_scale, total_scale, is_row, all_cols,
    N: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    OFFSET_1: tl.constexpr, OFFSET_2: tl.constexpr, OFFSET_3: tl.constexpr, OFFSET_4: tl.constexpr,
    PLAN_1: tl.constexpr, PLAN_2: tl.constexpr, BRANCH: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One tile of rows, read three or four times, chunk by chunk."""
    mean_4 = zeros(ROWS, 1, WIDE)
    if grad_y_ptr is not None:
        products = zeros(ROWS, BLOCK, WIDE)
        for start in range(0, N, BLOCK):
            cols = start + all_cols
            mask = is_row & (cols < N)
            grad_y = load_wide(grad_y_ptr, cols, mask, WIDE)
            total = load_wide(total_ptr, cols, mask, WIDE)
            if partial_4_ptr is not None:
                add_to_partial(partial_4_ptr, grad_y * (total * rstd_4), cols, mask, N)
            weight_4 = load_weight(weight_4_ptr, cols, N)
            products += weighted(grad_y, weight_4, OFFSET_4, WIDE) * total
        mean_4 = tl.sum(products, axis=1, keep_dims=True) * rstd_4 * (1.0 / N)
    products = zeros(ROWS, BLOCK, WIDE)
    for start in range(0, N, BLOCK):
        cols = start + all_cols
        mask = is_row & (cols < N)
        grad_residual = _grad_residual(
            grad_y_ptr, grad_total_ptr, total_ptr, weight_4_ptr, rstd_4, mean_4, total_scale,
            cols, mask, N, OFFSET_4, WIDE,
        )  # fmt: skip
        if grad_residual_ptr is not None:
            tl.store(grad_residual_ptr + cols, grad_residual, mask=mask)
        grad = grad_residual * branch_scale
        branch = _branch(
            x_1_ptr, x_2_ptr, weight_1_ptr, weight_2_ptr, rstd_1, rstd_2, cols, mask,
            N, OFFSET_1, OFFSET_2, PLAN_1, PLAN_2, BRANCH, WIDE,
        )  # fmt: skip
        if partial_3_ptr is not None:
            add_to_partial(partial_3_ptr, grad * (branch * rstd_3), cols, mask, N)
        products += weighted(grad, load_weight(weight_3_ptr, cols, N), OFFSET_3, WIDE) * branch
    mean_3 = tl.sum(products, axis=1, keep_dims=True) * rstd_3 * (1.0 / N)
    products_1 = zeros(ROWS, BLOCK, WIDE)
    products_2 = zeros(ROWS, BLOCK, WIDE)
    for start in range(0, N, BLOCK):
        cols = start + all_cols
        mask = is_row & (cols < N)
        grad = _grad_branch(
            weight_1_ptr, weight_2_ptr, weight_3_ptr, weight_4_ptr,
            grad_y_ptr, grad_total_ptr, x_1_ptr, x_2_ptr, total_ptr,
            rstd_1, rstd_2, rstd_3, rstd_4, mean_3, mean_4, branch_scale, total_scale, cols, mask,
            N, OFFSET_1, OFFSET_2, OFFSET_3, OFFSET_4, PLAN_1, PLAN_2, BRANCH, WIDE,
        )  # fmt: skip
        weight_1, weight_2 = load_weight(weight_1_ptr, cols, N), load_weight(weight_2_ptr, cols, N)
        unit_1 = load_wide(x_1_ptr, cols, mask, WIDE) * rstd_1
        unit_2 = load_wide(x_2_ptr, cols, mask, WIDE) * rstd_2
        products_1 += weighted(grad, weight_1, OFFSET_1, WIDE) * unit_1
        products_2 += weighted(grad, weight_2, OFFSET_2, WIDE) * unit_2
    sum_1, sum_2 = sums_of_two(products_1, products_2)
    for start in range(0, N, BLOCK):
        cols = start + all_cols
        mask = is_row & (cols < N)
        grad = _grad_branch(
            weight_1_ptr, weight_2_ptr, weight_3_ptr, weight_4_ptr,
            grad_y_ptr, grad_total_ptr, x_1_ptr, x_2_ptr, total_ptr,
            rstd_1, rstd_2, rstd_3, rstd_4, mean_3, mean_4, branch_scale, total_scale, cols, mask,
            N, OFFSET_1, OFFSET_2, OFFSET_3, OFFSET_4, PLAN_1, PLAN_2, BRANCH, WIDE,
        )  # fmt: skip
        _store_grad_x(
            partial_1_ptr, weight_1_ptr, x_1_ptr, grad_x_1_ptr, grad, rstd_1, sum_1 * (1.0 / N),
            cols, mask, N, OFFSET_1, WIDE,
        )  # fmt: skip
        _store_grad_x(
            partial_2_ptr, weight_2_ptr, x_2_ptr, grad_x_2_ptr, grad, rstd_2, sum_2 * (1.0 / N),
            cols, mask, N, OFFSET_2, WIDE,
        )  # fmt: skip


@triton.jit
def _grad_branch(
    weight_1_ptr, weight_2_ptr, weight_3_ptr, weight_4_ptr,
    grad_y_ptr, grad_total_ptr, x_1_ptr, x_2_ptr, total_ptr,
    rstd_1, rstd_2, rstd_3, rstd_4, mean_3, mean_4, branch_scale, total_scale, cols, mask,
    N: tl.constexpr,
    OFFSET_1: tl.constexpr, OFFSET_2: tl.constexpr, OFFSET_3: tl.constexpr, OFFSET_4: tl.constexpr,
    PLAN_1: tl.constexpr, PLAN_2: tl.constexpr, BRANCH: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """A tile of the gradient of the branch, made of the operands again."""
    grad = branch_scale * _grad_residual(
        grad_y_ptr, grad_total_ptr, total_ptr, weight_4_ptr, rstd_4, mean_4, total_scale,
        cols, mask, N, OFFSET_4, WIDE,
    )  # fmt: skip
    branch = _branch(
        x_1_ptr, x_2_ptr, weight_1_ptr, weight_2_ptr, rstd_1, rstd_2, cols, mask,
        N, OFFSET_1, OFFSET_2, PLAN_1, PLAN_2, BRANCH, WIDE,
    )  # fmt: skip
    grad_unit = weighted(grad, load_weight(weight_3_ptr, cols, N), OFFSET_3, WIDE)
    return norm_gradient(grad_unit, branch * rstd_3, rstd_3, mean_3)
