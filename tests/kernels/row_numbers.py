"""A kernel that writes where the rows of a launch lie."""

import triton
import triton.language as tl

from normfuse.ops.kernels.row import row_numbers


@triton.jit
def row_numbers_kernel(
    numbers_ptr, first, bound, size_middle, size_inner, ROWS: tl.constexpr
):  # fmt: skip
    """Of ROWS rows from `first` on, their three numbers; `bound` is the number of all rows."""
    place = tl.arange(0, ROWS)
    row = first.to(tl.int64) + place
    outer, middle, inner = row_numbers(row, size_middle, size_inner, bound)
    tl.store(numbers_ptr + 3 * place, outer)
    tl.store(numbers_ptr + 3 * place + 1, middle)
    tl.store(numbers_ptr + 3 * place + 2, inner)
