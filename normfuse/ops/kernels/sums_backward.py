"""What the backward kernels of several norms share: sums and weights, of which any may be absent.

For every weight, a program holds a tuple of tiles, one for each chunk of its rows; () if there is
none.
"""

import triton
import triton.language as tl

from normfuse.ops.kernels.row_backward import load_held_weight, store_partial, zeros


@triton.jit
def zero_sums(
    partial_ptr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, CHUNKS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """A tile for each chunk of a row, to sum a weight's gradient in; () if nobody wants it."""
    sums = ()
    if partial_ptr is not None:
        for _ in tl.static_range(CHUNKS):
            sums += (zeros(ROWS, BLOCK, WIDE),)
    return sums


@triton.jit
def load_weights(
    grad_ptr, weight_ptr, all_cols,
    N: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """The tiles of a weight; () of a norm that is absent."""
    weights = ()
    if grad_ptr is not None:
        for chunk in tl.static_range(CHUNKS):
            weights += (load_held_weight(weight_ptr, chunk * BLOCK + all_cols, N, ROWS),)
    return weights


@triton.jit
def store_sums(
    partial_ptr, sums, all_cols, N: tl.constexpr, BLOCK: tl.constexpr, CHUNKS: tl.constexpr
):
    """What a program's rows add to a weight's gradient."""
    if partial_ptr is not None:
        for chunk in tl.static_range(CHUNKS):
            store_partial(partial_ptr, sums[chunk], chunk * BLOCK + all_cols, N)
