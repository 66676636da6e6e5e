"""Rows too wide for a program's registers: read chunk by chunk, again from the cache.

What such rows add to the gradients of weights is summed in memory, where each program has a row of
its own; one thread reads and writes an element in turn, so that the order of the sums is fixed.
"""

import triton
import triton.language as tl

from normfuse.ops.kernels.row_backward import (
    add_to_partial,
    load_weight,
    load_wide,
    mean_of,
    norm_gradient,
    store_gradients,
    weighted,
    zeros,
)


@triton.jit
def stream_norm(
    partial_ptr, weight_ptr, grad_y_ptr, grad_total_ptr, x_ptr, grad_x_ptr, grad_residual_ptr,
    rstd, branch_scale, total_scale, is_row, all_cols,
    N: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    SHARE: tl.constexpr, OFFSET: tl.constexpr, SUM: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One tile of rows of `rms_norm_backward`, read twice."""
    products = zeros(ROWS, BLOCK, WIDE)
    for start in range(0, N, BLOCK):
        cols = start + all_cols
        mask = is_row & (cols < N)
        grad_y = load_wide(grad_y_ptr, cols, mask, WIDE)
        grad_unit = weighted(grad_y, load_weight(weight_ptr, cols, N), OFFSET, WIDE)
        products += grad_unit * load_wide(x_ptr, cols, mask, WIDE)
    mean = mean_of(products, rstd, branch_scale, total_scale, SHARE, SUM)
    for start in range(0, N, BLOCK):
        cols = start + all_cols
        mask = is_row & (cols < N)
        unit = load_wide(x_ptr, cols, mask, WIDE) * rstd
        grad_y = store_gradients(
            load_wide(grad_y_ptr, cols, mask, WIDE), load_weight(weight_ptr, cols, N),
            unit, rstd, mean, grad_total_ptr, grad_x_ptr, grad_residual_ptr,
            branch_scale, total_scale, cols, mask, OFFSET, SUM, WIDE,
        )  # fmt: skip
        if partial_ptr is not None:
            add_to_partial(partial_ptr, grad_y * unit, cols, mask, N)


@triton.jit
def _grad_branch(
    grad_y, total, grad_total_ptr, weight_ptr, rstd, mean, branch_scale, total_scale, cols, mask,
    N: tl.constexpr, OFFSET: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The gradients of the residual and of the branch, of a tile of the second norm."""
    grad_unit = weighted(grad_y, load_weight(weight_ptr, cols, N), OFFSET, WIDE)
    grad = norm_gradient(grad_unit, total * rstd, rstd, mean)
    grad_residual = (grad + load_wide(grad_total_ptr, cols, mask, WIDE)) * total_scale
    return grad_residual, grad_residual * branch_scale


@triton.jit
def stream_sandwich(
    partial_1_ptr, partial_2_ptr, weight_1_ptr, weight_2_ptr,
    grad_y_ptr, grad_total_ptr, x_ptr, total_ptr, grad_x_ptr, grad_residual_ptr,
    rstd_1, rstd_2, branch_scale, total_scale, is_row, all_cols,
    N: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    OFFSET_1: tl.constexpr, OFFSET_2: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One tile of rows, read three times, chunk by chunk; the sums stay in memory."""
    products = zeros(ROWS, BLOCK, WIDE)
    for start in range(0, N, BLOCK):
        cols = start + all_cols
        mask = is_row & (cols < N)
        grad_y = load_wide(grad_y_ptr, cols, mask, WIDE)
        grad_unit = weighted(grad_y, load_weight(weight_2_ptr, cols, N), OFFSET_2, WIDE)
        products += grad_unit * load_wide(total_ptr, cols, mask, WIDE)
    mean_2 = tl.sum(products, axis=1, keep_dims=True) * rstd_2 * (1.0 / N)
    products = zeros(ROWS, BLOCK, WIDE)
    for start in range(0, N, BLOCK):
        cols = start + all_cols
        mask = is_row & (cols < N)
        grad_y = load_wide(grad_y_ptr, cols, mask, WIDE)
        total = load_wide(total_ptr, cols, mask, WIDE)
        grad_residual, grad_branch = _grad_branch(
            grad_y, total, grad_total_ptr, weight_2_ptr, rstd_2, mean_2,
            branch_scale, total_scale, cols, mask, N, OFFSET_2, WIDE,
        )  # fmt: skip
        if grad_residual_ptr is not None:
            tl.store(grad_residual_ptr + cols, grad_residual, mask=mask)
        if partial_2_ptr is not None:
            add_to_partial(partial_2_ptr, grad_y * total * rstd_2, cols, mask, N)
        grad_unit = weighted(grad_branch, load_weight(weight_1_ptr, cols, N), OFFSET_1, WIDE)
        products += grad_unit * load_wide(x_ptr, cols, mask, WIDE)
    mean_1 = tl.sum(products, axis=1, keep_dims=True) * rstd_1 * (1.0 / N)
    for start in range(0, N, BLOCK):
        cols = start + all_cols
        mask = is_row & (cols < N)
        _, grad_branch = _grad_branch(
            load_wide(grad_y_ptr, cols, mask, WIDE), load_wide(total_ptr, cols, mask, WIDE),
            grad_total_ptr, weight_2_ptr, rstd_2, mean_2,
            branch_scale, total_scale, cols, mask, N, OFFSET_2, WIDE,
        )  # fmt: skip
        unit_1 = load_wide(x_ptr, cols, mask, WIDE) * rstd_1
        if partial_1_ptr is not None:
            add_to_partial(partial_1_ptr, grad_branch * unit_1, cols, mask, N)
        if grad_x_ptr is not None:
            grad_unit = weighted(grad_branch, load_weight(weight_1_ptr, cols, N), OFFSET_1, WIDE)
            tl.store(grad_x_ptr + cols, norm_gradient(grad_unit, unit_1, rstd_1, mean_1), mask=mask)
