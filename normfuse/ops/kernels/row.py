"""Row pieces that the kernels share: statistic, normalisation, weight, residual sum.

A tile is (ROWS, BLOCK). Types are named as in a rounding plan: "f64", "f32", "bf16", "f16". Between
two roundings a value is held in the type in which torch computes with it: float64 for float64,
float32 for the rest.
"""

import triton
import triton.language as tl


@triton.constexpr_function
def step(PLAN, name):
    """One step of a plan as `constants.py` writes it: step("compute=f32 ...", "compute") is f32."""
    return dict(item.split("=") for item in PLAN.split())[name]


@triton.jit
def rounded(value, TYPE: tl.constexpr):
    """`value` rounded to TYPE, held in float64 or float32."""
    if TYPE == "f64":
        result = value.to(tl.float64)
    else:
        # Also on the way from float64 to 16 bits: torch goes through float32 and rounds twice.
        result = value.to(tl.float32)
        if TYPE == "bf16":
            result = result.to(tl.bfloat16).to(tl.float32)
        if TYPE == "f16":
            result = result.to(tl.float16).to(tl.float32)
    return result


@triton.jit
def widened(value):
    """A value in the type in which torch computes with it."""
    if value.dtype != tl.float64:
        value = value.to(tl.float32)
    return value


@triton.jit
def load_held(pointers, mask):
    """Elements held in float64 or float32, and zero where masked: it adds nothing to a sum."""
    return widened(tl.load(pointers, mask=mask, other=0.0))


@triton.jit
def multiplied(left, right, TYPE: tl.constexpr, IS_ADDED: tl.constexpr, ON: tl.constexpr):
    """left * right rounded to TYPE; IS_ADDED says that a sum reads it.

    Where both hold values of TYPE, ON may name the GPU: it then multiplies two pairs at once.
    """
    if ON == "cuda" and TYPE == "bf16":
        result = tl.inline_asm_elementwise(
            "{ .reg .b32 zero; mov.b32 zero, 0x80008000; fma.rn.bf16x2 $0, $1, $2, zero; }",
            "=r,r,r",
            [left.to(tl.bfloat16), right.to(tl.bfloat16)],
            dtype=tl.bfloat16,
            is_pure=True,
            pack=2,
        ).to(tl.float32)
    else:
        # The compiler would contract a product and a sum to one FMA, which rounds once where eager
        # rounds twice. It must keep this zero, which turns -0 into +0; the sum reads them as one.
        result = tl.fma(left, right, 0.0) if IS_ADDED else left * right
        result = rounded(result, TYPE)
    return result


@triton.jit
def added(left, right, SIGN: tl.constexpr, TYPE: tl.constexpr, ON: tl.constexpr):
    """left + SIGN * right rounded to TYPE; SIGN is 1 or -1, ON as in `multiplied`."""
    if ON == "cuda" and TYPE == "bf16":
        ONES: tl.constexpr = "0x3f803f80" if SIGN > 0 else "0xbf80bf80"
        result = tl.inline_asm_elementwise(
            "{ .reg .b32 ones; mov.b32 ones, " + ONES + "; fma.rn.bf16x2 $0, $2, ones, $1; }",
            "=r,r,r",
            [left.to(tl.bfloat16), right.to(tl.bfloat16)],
            dtype=tl.bfloat16,
            is_pure=True,
            pack=2,
        ).to(tl.float32)
    else:
        result = rounded(left + SIGN * right, TYPE)
    return result


@triton.jit
def divided(numerator, denominator):
    """The correctly rounded quotient; `/` is an approximation in float32."""
    if denominator.dtype == tl.float64:
        result = numerator / denominator
    else:
        result = tl.div_rn(numerator, denominator)
    return result


@triton.jit
def square_root(value):
    """The correctly rounded root; `tl.sqrt` is an approximation in float32."""
    return tl.sqrt(value) if value.dtype == tl.float64 else tl.sqrt_rn(value)


@triton.jit
def row_index(ROWS: tl.constexpr):
    """The rows of this program, (ROWS, 1); int64, because row times stride passes 2^31."""
    return tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]


@triton.jit
def row_of_tile(tile, ROWS: tl.constexpr):
    """`row_index` for a program that takes several tiles of rows."""
    return (tile * ROWS + tl.arange(0, ROWS)[:, None]).to(tl.int64)


@triton.jit
def squares(x, PLAN: tl.constexpr):
    """What the statistic sums: the squares of a tile, as `x.to(compute).pow(2)`."""
    COMPUTE: tl.constexpr = step(PLAN, "compute")
    h = rounded(x, COMPUTE)
    return rounded(h * h, COMPUTE)


@triton.jit
def zero_sums(ROWS: tl.constexpr, BLOCK: tl.constexpr, PLAN: tl.constexpr):
    """Sums of squares of a row that is read in chunks, one a lane."""
    return tl.zeros([ROWS, BLOCK], tl.float64 if step(PLAN, "compute") == "f64" else tl.float32)


@triton.jit
def root_of(sums, eps_ptr, N: tl.constexpr, EPS: tl.constexpr, PLAN: tl.constexpr):
    """Sums of squares (ROWS, BLOCK) -> the root (ROWS, 1) that multiplies x, or divides it."""
    return root_of_total(tl.sum(sums, axis=1, keep_dims=True), eps_ptr, N, EPS, PLAN)


@triton.jit
def roots_of_two(
    sums_1,
    sums_2,
    N: tl.constexpr,
    EPS_1: tl.constexpr,
    PLAN_1: tl.constexpr,
    EPS_2: tl.constexpr,
    PLAN_2: tl.constexpr,
):
    """`root_of` for two rows: what lanes tell each other goes in one message, not in two."""
    if sums_1.dtype == sums_2.dtype:
        total_1, total_2 = tl.split(tl.sum(tl.join(sums_1, sums_2), axis=1))
        root_1 = root_of_total(total_1[:, None], None, N, EPS_1, PLAN_1)
        root_2 = root_of_total(total_2[:, None], None, N, EPS_2, PLAN_2)
    else:
        root_1 = root_of(sums_1, None, N, EPS_1, PLAN_1)
        root_2 = root_of(sums_2, None, N, EPS_2, PLAN_2)
    return root_1, root_2


@triton.jit
def root_of_total(total, eps_ptr, N: tl.constexpr, EPS: tl.constexpr, PLAN: tl.constexpr):
    """`root_of` for a sum of squares (ROWS, 1)."""
    COMPUTE: tl.constexpr = step(PLAN, "compute")
    MEAN: tl.constexpr = step(PLAN, "mean")
    ROOT: tl.constexpr = step(PLAN, "root")
    if MEAN != "mean":
        total = rounded(total, COMPUTE)  # eager's `.sum(-1)`
    mean = total
    if MEAN != "sum":
        # On a GPU, eager's `mean`, `/ N` and `* (1 / N)` all multiply by the rounded reciprocal.
        reciprocal = tl.full([1, 1], 1.0 / N, total.dtype)
        mean = multiplied(total, reciprocal, COMPUTE, True, "none")  # eager's mean
    variance = mean
    if step(PLAN, "eps") == "added":
        if eps_ptr is None:
            variance = rounded(mean + EPS, COMPUTE)  # eager's `+ eps`
        else:
            eps = rounded(tl.load(eps_ptr), COMPUTE)  # torch casts a 0-d operand first
            variance = rounded(mean + eps, COMPUTE)
    if ROOT == "rsqrt" or ROOT == "pow":
        root = tl.rsqrt(variance)  # torch's `pow(-0.5)` is its rsqrt
    else:
        root = rounded(square_root(variance), COMPUTE)  # eager's sqrt
        if step(PLAN, "eps") == "bounds":
            root = bounded(root, eps_ptr, EPS, COMPUTE)
        if ROOT == "reciprocal_sqrt":
            root = divided(1.0, root)
    return rounded(root, COMPUTE)


@triton.jit
def bounded(root, eps_ptr, EPS: tl.constexpr, COMPUTE: tl.constexpr):
    """Eager's `.clamp(min=eps)` of a root, which leaves what is not a number."""
    if eps_ptr is None:
        bound = tl.full([1, 1], EPS, root.dtype)
    else:
        bound = tl.load(eps_ptr).to(root.dtype)
    bound = rounded(bound, COMPUTE)
    return tl.where(root < bound, bound, root)


@triton.jit
def store_inverse_root(rstd_ptr, root, row, num_rows, PLAN: tl.constexpr):
    """Stores 1 / sqrt(mean + eps), one for each row, where someone asked for it."""
    if rstd_ptr is not None:
        if step(PLAN, "root") == "divide_by_sqrt":
            # `.reciprocal()` of the reference
            root = rounded(divided(1.0, root), step(PLAN, "compute"))
        tl.store(rstd_ptr + row, root, mask=row < num_rows)


@triton.jit
def normalised(
    x,
    root,
    weight,
    OFFSET: tl.constexpr,
    PLAN: tl.constexpr,
    IS_ADDED: tl.constexpr,
):
    """A tile of x times its root, times weight + offset, with the roundings of one plan.

    `weight` is a tile that broadcasts to x, or None.
    """
    FORM: tl.constexpr = step(PLAN, "form")
    ROOT: tl.constexpr = step(PLAN, "root")
    x = rounded(x, FORM)
    root = rounded(
        rounded(root, step(PLAN, "rstd")), FORM
    )  # eager's cast of the root before it meets x
    if ROOT == "divide_by_sqrt":
        unit = rounded(divided(x, root), FORM)
    else:
        unit = multiplied(x, root, FORM, IS_ADDED, "none")
    unit = rounded(unit, step(PLAN, "unit"))  # eager's `.to(input_dtype)` before the weight
    if weight is not None:
        WEIGHT: tl.constexpr = step(PLAN, "weight")
        PRODUCT: tl.constexpr = step(PLAN, "product")
        factor = rounded(weight, WEIGHT)  # eager's `weight.float()`
        if OFFSET != 0.0:
            factor = rounded(factor + OFFSET, WEIGHT)  # eager's `1.0 + weight`
        factor = rounded(rounded(factor, step(PLAN, "factor")), PRODUCT)
        unit = multiplied(
            rounded(unit, PRODUCT), factor, PRODUCT, IS_ADDED, step(PLAN, "on")
        )  # eager's product
    return rounded(unit, step(PLAN, "out"))  # eager's cast of the result


@triton.jit
def load_scale(scale_ptr):
    """The only element of a tensor that scales, or None."""
    if scale_ptr is not None:
        return tl.load(scale_ptr)


@triton.jit
def scaled(
    value,
    scale,
    SCALE: tl.constexpr,
    TYPE: tl.constexpr,
    RESULT: tl.constexpr,
    IS_ADDED: tl.constexpr,
):
    """`value` of TYPE times SCALE, times `scale`, a scalar or None that may widen to RESULT."""
    if SCALE is not None:
        number = tl.full([1, 1], SCALE, value.dtype)  # torch keeps a number in the held type
        value = multiplied(value, number, TYPE, IS_ADDED, "none")  # eager's product with a number
    if scale is not None:
        scale = rounded(scale, RESULT)  # torch casts a 0-d operand first
        value = multiplied(
            rounded(value, RESULT), scale, RESULT, IS_ADDED, "none"
        )  # eager's product
    return value


@triton.jit
def residual_sum(
    branch,
    residual,
    branch_scale,
    total_scale,
    BRANCH_SCALE: tl.constexpr,
    TOTAL_SCALE: tl.constexpr,
    SUM: tl.constexpr,
):
    """(residual + branch * branch_scale) * total_scale; each step rounds to the promoted type."""
    TYPE: tl.constexpr = step(SUM, "sum")
    branch = scaled(
        branch, branch_scale, BRANCH_SCALE, step(SUM, "branch"), step(SUM, "scaled"), True
    )
    total = rounded(rounded(residual, TYPE) + rounded(branch, TYPE), TYPE)  # eager's add
    return scaled(total, total_scale, TOTAL_SCALE, TYPE, step(SUM, "total"), False)


@triton.jit
def _divided(number, size, bound):
    """Quotients and remainders, int64, of numbers of rows, int64, below a bound.

    In 32 bits if the bound is one of 32: nothing can be read before, and dividing 64 bits takes a
    hundred instructions. Triton passes a size of one as a constant, which leaves nothing to do.
    """
    if isinstance(size, int):
        quotient, remainder = number // size, number % size
    else:
        # Of the sum, since a bound of one is a constant, and has no type.
        if (tl.program_id(0) + bound).dtype == tl.int32:
            number, size = number.to(tl.uint32), size.to(tl.uint32)
        quotient, remainder = (number // size).to(tl.int64), (number % size).to(tl.int64)
    return quotient, remainder


@triton.jit
def row_numbers(row, size_middle, size_inner, bound):
    """Of each row below `bound` its number along three axes, split as `rows.RowStrides` says."""
    outer_and_middle, inner = _divided(row, size_inner, bound)
    outer, middle = _divided(outer_and_middle, size_middle, bound)
    return outer, middle, inner


@triton.jit
def row_start(
    row, size_middle, size_inner, stride_outer, stride_middle, stride_inner, bound=None
):  # fmt: skip
    """Where each row begins. `bound` as in `row_numbers`, if it is known."""
    if bound is not None:
        outer, middle, inner = row_numbers(row, size_middle, size_inner, bound)
    else:
        if len(row.shape) == 2:
            if row.shape[0] == 1:
                # A program has one row where it is wide: memory holds fewer than 2^31 of them.
                row = row.to(tl.int32)
        outer = (row // size_inner // size_middle).to(tl.int64)
        middle = (row // size_inner % size_middle).to(tl.int64)
        inner = (row % size_inner).to(tl.int64)
    return outer * stride_outer + middle * stride_middle + inner * stride_inner


@triton.jit
def gated(value, gate, GATING: tl.constexpr, ON: tl.constexpr):
    """A tile of value * act(gate), with the roundings of one gate; ON as in `multiplied`."""
    TYPE: tl.constexpr = step(GATING, "gate")
    ACTIVATION: tl.constexpr = step(GATING, "activation")
    PRODUCT: tl.constexpr = step(GATING, "product")
    gate = rounded(gate, TYPE)  # eager's cast of the gate
    # torch's formula. A correctly rounded quotient would double the registers of a thread, from 37
    # to 72 (tests/kernels/cross_compile.py, sm_100, rows of 256); this one errs by 2 units at most.
    grown = 1.0 + tl.exp(-gate)
    if ACTIVATION == "silu":
        factor = gate / grown
    else:
        factor = 1.0 / grown
        if ACTIVATION == "x_sigmoid":
            factor = gate * rounded(factor, TYPE)
    factor = rounded(rounded(factor, TYPE), step(GATING, "factor"))  # eager's activation
    value, factor = rounded(value, PRODUCT), rounded(factor, PRODUCT)
    product = multiplied(value, factor, PRODUCT, False, ON)
    return rounded(product, step(GATING, "out"))  # eager's cast of the result


@triton.jit
def modulated(
    value, scale, shift, SCALE_OFFSET: tl.constexpr, MODULATION: tl.constexpr, ON: tl.constexpr
):
    """A tile of value * (scale + offset) + shift; shift may be None, ON as in `multiplied`."""
    FACTOR: tl.constexpr = step(MODULATION, "factor")
    PRODUCT: tl.constexpr = step(MODULATION, "product")
    SUM: tl.constexpr = step(MODULATION, "sum")
    factor = rounded(scale, FACTOR)
    if SCALE_OFFSET != 0.0:
        factor = rounded(factor + SCALE_OFFSET, FACTOR)  # eager's `1 + scale`
    value, factor = rounded(value, PRODUCT), rounded(factor, PRODUCT)
    value = multiplied(value, factor, PRODUCT, shift is not None, ON)  # eager's product
    if shift is not None:
        value = added(rounded(value, SUM), rounded(shift, SUM), 1, SUM, ON)  # eager's add
    return rounded(value, step(MODULATION, "out"))  # eager's cast of the result
