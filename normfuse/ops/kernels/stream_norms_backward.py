"""Rows of `rms_norms_backward` too wide for a program's registers: read twice, chunk by chunk."""

import triton
import triton.language as tl

from normfuse.ops.kernels.row_backward import (
    add_to_partial,
    load_weight,
    load_wide,
    norm_gradient,
    weighted,
    zeros,
)


@triton.jit
def _taken(
    grad_unit, partial_ptr, weight_ptr, grad_ptr, unit, cols, mask,
    N: tl.constexpr, OFFSET: tl.constexpr, SCALE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One tile of one norm; the sums of the weight's gradient, if there are any, stay in memory."""
    if grad_ptr is not None:
        grad = load_wide(grad_ptr, cols, mask, WIDE) * SCALE
        grad_unit += weighted(grad, load_weight(weight_ptr, cols, N), OFFSET, WIDE)
        if partial_ptr is not None:
            add_to_partial(partial_ptr, grad * unit, cols, mask, N)
    return grad_unit


@triton.jit
def stream_norms(
    partial_1_ptr, partial_2_ptr, partial_3_ptr, partial_4_ptr,
    weight_1_ptr, weight_2_ptr, weight_3_ptr, weight_4_ptr,
    grad_1_ptr, grad_2_ptr, grad_3_ptr, grad_4_ptr, x_ptr, grad_x_ptr, rstd, is_row, all_cols,
    N: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, SHARE: tl.constexpr,
    OFFSET_1: tl.constexpr, OFFSET_2: tl.constexpr, OFFSET_3: tl.constexpr, OFFSET_4: tl.constexpr,
    SCALE_1: tl.constexpr, SCALE_2: tl.constexpr, SCALE_3: tl.constexpr, SCALE_4: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """One tile of rows, read twice, chunk by chunk; the sums stay in memory."""
    products = zeros(ROWS, BLOCK, WIDE)
    for start in range(0, N, BLOCK):
        cols = start + all_cols
        mask = is_row & (cols < N)
        unit = load_wide(x_ptr, cols, mask, WIDE) * rstd
        grad = zeros(ROWS, BLOCK, WIDE)
        grad = _taken(
            grad, partial_1_ptr, weight_1_ptr, grad_1_ptr, unit, cols, mask,
            N, OFFSET_1, SCALE_1, WIDE,
        )  # fmt: skip
        grad = _taken(
            grad, partial_2_ptr, weight_2_ptr, grad_2_ptr, unit, cols, mask,
            N, OFFSET_2, SCALE_2, WIDE,
        )  # fmt: skip
        grad = _taken(
            grad, partial_3_ptr, weight_3_ptr, grad_3_ptr, unit, cols, mask,
            N, OFFSET_3, SCALE_3, WIDE,
        )  # fmt: skip
        grad = _taken(
            grad, partial_4_ptr, weight_4_ptr, grad_4_ptr, unit, cols, mask,
            N, OFFSET_4, SCALE_4, WIDE,
        )  # fmt: skip
        products += grad * unit
    if grad_x_ptr is not None:
        mean = tl.sum(products, axis=1, keep_dims=True) * SHARE
        for start in range(0, N, BLOCK):
            cols = start + all_cols
            mask = is_row & (cols < N)
            unit = load_wide(x_ptr, cols, mask, WIDE) * rstd
            grad = zeros(ROWS, BLOCK, WIDE)
            grad = _taken(
                grad, None, weight_1_ptr, grad_1_ptr, unit, cols, mask, N, OFFSET_1, SCALE_1, WIDE
            )
            grad = _taken(
                grad, None, weight_2_ptr, grad_2_ptr, unit, cols, mask, N, OFFSET_2, SCALE_2, WIDE
            )
            grad = _taken(
                grad, None, weight_3_ptr, grad_3_ptr, unit, cols, mask, N, OFFSET_3, SCALE_3, WIDE
            )
            grad = _taken(
                grad, None, weight_4_ptr, grad_4_ptr, unit, cols, mask, N, OFFSET_4, SCALE_4, WIDE
            )
            tl.store(grad_x_ptr + cols, norm_gradient(grad, unit, rstd, mean), mask=mask)
