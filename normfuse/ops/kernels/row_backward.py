"""Row pieces that the backward kernels share: wide values, factors, sums of partial sums.

WIDE names the type in which gradients accumulate, "f64" or "f32". Gradients of weights are summed
in two stages and a fixed order, so that they have the same bits in every run: each program adds up
its own rows, then `sum_partials_kernel` adds up the programs.
"""

import triton
import triton.language as tl


@triton.constexpr_function
def wide_type(WIDE):
    """The type that WIDE names."""
    return tl.float64 if WIDE == "f64" else tl.float32


@triton.jit
def zeros(ROWS: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """A tile to accumulate in."""
    return tl.zeros([ROWS, BLOCK], wide_type(WIDE))


@triton.jit
def load_rstd(rstd_ptr, row, num_rows, WIDE: tl.constexpr):
    """One inverse root for each row, (ROWS, 1)."""
    return tl.load(rstd_ptr + row, mask=row < num_rows, other=0.0).to(wide_type(WIDE))


@triton.jit
def load_wide(pointer, cols, mask, WIDE: tl.constexpr):
    """A tile in the type in which gradients accumulate; zeros of a tensor that is absent."""
    if pointer is None:
        value = tl.zeros(cols.shape, wide_type(WIDE))
    else:
        value = tl.load(pointer + cols, mask=mask, other=0.0).to(wide_type(WIDE))
    return value


@triton.jit
def load_weight(weight_ptr, cols, N: tl.constexpr):
    """A tile of the weight in its own type; ones of a norm that has none."""
    if weight_ptr is None:
        weight = tl.full(cols.shape, 1.0, tl.float32)
    else:
        weight = tl.load(weight_ptr + cols, mask=cols < N, other=0.0)
    return weight


@triton.jit
def load_held_weight(weight_ptr, cols, N: tl.constexpr, ROWS: tl.constexpr):
    """The weight beside every row of a tile: a thread then holds it for the columns that it has.

    Loaded once for all rows, it may lie with other threads, which exchange 16 bits at a time for
    every tile. Two rows have warps of their own, and one weight for both: 7 % faster at 2816
    columns, 2 % slower at 4096 (backward_pairs_h200.json against backward_h200.json).
    """
    COPIES: tl.constexpr = ROWS if ROWS > 2 else 1
    return load_weight(weight_ptr, cols + tl.zeros([COPIES, 1], tl.int32), N)


@triton.jit
def weight_at(weights, weight_ptr, cols, chunk: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr):
    """One tile of the weight: held where several rows share it, else from the cache for each row.

    Beside a wide row of a gated or modulated norm, a held weight would leave too few registers.
    """
    return weights[chunk] if ROWS > 1 else load_weight(weight_ptr, cols, N)


@triton.jit
def load_scale(pointer, NUMBER: tl.constexpr, WIDE: tl.constexpr):
    """A factor of a residual sum: its number times its tensor's element, where present; (1, 1)."""
    scale = tl.full([1, 1], 1.0 if NUMBER is None else NUMBER, wide_type(WIDE))
    if pointer is not None:
        scale *= tl.load(pointer).to(wide_type(WIDE))
    return scale


@triton.jit
def weighted(grad_y, weight, OFFSET: tl.constexpr, WIDE: tl.constexpr):
    """grad_y * (weight + offset): the gradient of the unit value."""
    return grad_y * (weight.to(wide_type(WIDE)) + OFFSET)


@triton.jit
def norm_gradient(grad_unit, unit, rstd, mean):
    """The gradient of x for that of its unit value; `mean` is that of their product."""
    return rstd * (grad_unit - unit * mean)


@triton.jit
def mean_of(products, rstd, branch_scale, total_scale, SHARE: tl.constexpr, SUM: tl.constexpr):
    """The mean of grad_unit * unit of each row, from the products of x with weighted gradients."""
    mean = tl.sum(products, axis=1, keep_dims=True) * rstd * SHARE
    if SUM == "last":
        mean *= branch_scale * total_scale  # of the gradient on its way through the sum
    return mean


@triton.jit
def store_gradients(
    grad_y, weight, unit, rstd, mean, grad_total_ptr, grad_x_ptr, grad_residual_ptr,
    branch_scale, total_scale, cols, mask,
    OFFSET: tl.constexpr, SUM: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Stores a tile of the gradients of x and residual; returns that of the norm's result.

    SUM says where the residual sum is: "first", before the norm, "last", after it, or "".
    """
    if SUM == "last":
        grad_residual = grad_y * total_scale
        grad_y = grad_residual * branch_scale
    grad = norm_gradient(weighted(grad_y, weight, OFFSET, WIDE), unit, rstd, mean)
    if SUM == "first":
        grad_residual = (grad + load_wide(grad_total_ptr, cols, mask, WIDE)) * total_scale
        grad = grad_residual * branch_scale
    if grad_x_ptr is not None:
        tl.store(grad_x_ptr + cols, grad, mask=mask)
    if grad_residual_ptr is not None:
        tl.store(grad_residual_ptr + cols, grad_residual, mask=mask)
    return grad_y


@triton.constexpr_function
def halvings(COUNT):
    """How often a power of two can be halved."""
    return COUNT.bit_length() - 1


@triton.jit
def sum_of_rows(sums):
    """(ROWS, BLOCK) -> (1, BLOCK): the lower half of the rows is added to the upper, and so on.

    `tl.sum` over an axis that warps share writes to shared memory with many lanes on one bank.
    """
    BLOCK: tl.constexpr = sums.shape[1]
    for _ in tl.static_range(halvings(sums.shape[0])):
        upper, lower = tl.split(tl.trans(tl.reshape(sums, [2, sums.shape[0] // 2 * BLOCK])))
        sums = tl.reshape(upper + lower, [upper.shape[0] // BLOCK, BLOCK])
    return sums


@triton.jit
def store_partial(partial_ptr, sums, cols, N: tl.constexpr):
    """What a program's rows add to a weight's gradient: (ROWS, BLOCK) summed over the rows."""
    at = partial_ptr + tl.program_id(0).to(tl.int64) * N + cols
    tl.store(at, sum_of_rows(sums), mask=cols < N)


@triton.jit
def add_to_partial(partial_ptr, addend, cols, mask, N: tl.constexpr):
    """The same for a row too wide for registers: the sums of this program stay in memory."""
    at = partial_ptr + tl.program_id(0).to(tl.int64) * N + cols
    tl.store(at, tl.load(at, mask=mask, other=0.0) + addend, mask=mask)


@triton.jit
def _sum_partials(
    partial_ptr, grad_weight_ptr, num_partials,
    N: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    cols = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]
    sums = tl.zeros([ROWS, BLOCK], partial_ptr.dtype.element_ty)
    for start in range(0, num_partials, ROWS):
        row = start + tl.arange(0, ROWS)[:, None]
        mask = (row < num_partials) & (cols < N)
        sums += tl.load(partial_ptr + row.to(tl.int64) * N + cols, mask=mask, other=0.0)
    tl.store(grad_weight_ptr + cols, tl.sum(sums, axis=0, keep_dims=True), mask=cols < N)


@triton.jit
def sum_partials_kernel(
    partial_1_ptr, grad_weight_1_ptr, num_partials_1,
    partial_2_ptr, grad_weight_2_ptr, num_partials_2,
    partial_3_ptr, grad_weight_3_ptr, num_partials_3,
    partial_4_ptr, grad_weight_4_ptr, num_partials_4,
    N_1: tl.constexpr, N_2: tl.constexpr, N_3: tl.constexpr, N_4: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Up to four weights: program (i, j) sums columns i * BLOCK, ... of weight j; N is 0 for none.

    The order of the additions depends on the number of partial sums alone.
    """
    which = tl.program_id(1)
    if which == 0:
        _sum_partials(partial_1_ptr, grad_weight_1_ptr, num_partials_1, N_1, ROWS, BLOCK)
    if N_2 > 0:
        if which == 1:
            _sum_partials(partial_2_ptr, grad_weight_2_ptr, num_partials_2, N_2, ROWS, BLOCK)
    if N_3 > 0:
        if which == 2:
            _sum_partials(partial_3_ptr, grad_weight_3_ptr, num_partials_3, N_3, ROWS, BLOCK)
    if N_4 > 0:
        if which == 3:
            _sum_partials(partial_4_ptr, grad_weight_4_ptr, num_partials_4, N_4, ROWS, BLOCK)
