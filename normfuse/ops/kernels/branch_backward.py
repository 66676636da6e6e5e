"""Row pieces of the backward of two normalised branches: what held and streamed rows share."""

import triton
import triton.language as tl

from normfuse.ops.kernels.row import divided, normalised, rounded, step, widened
from normfuse.ops.kernels.row_backward import load_wide, norm_gradient, weighted


@triton.constexpr_function
def has_weight(PLAN):
    """Whether the norm of a plan has a weight."""
    return " weight=" in PLAN


@triton.jit
def _normed(x, weight, rstd, OFFSET: tl.constexpr, PLAN: tl.constexpr):
    """A tile of a norm's result again, as the forward kernel rounded it, from its inverse root."""
    root = rounded(rstd, step(PLAN, "compute"))
    if step(PLAN, "root") == "divide_by_sqrt":
        root = rounded(divided(1.0, root), step(PLAN, "compute"))
    if has_weight(PLAN):
        y = normalised(widened(x), root, widened(weight), OFFSET, PLAN, True)
    else:
        y = normalised(widened(x), root, None, OFFSET, PLAN, True)
    return y


@triton.jit
def branch_of(
    x_1, x_2, weight_1, weight_2, rstd_1, rstd_2,
    OFFSET_1: tl.constexpr, PLAN_1: tl.constexpr, OFFSET_2: tl.constexpr, PLAN_2: tl.constexpr,
    BRANCH: tl.constexpr,
):  # fmt: skip
    """norm_1(x_1) + norm_2(x_2) of a tile, rounded to the promoted type BRANCH as eager's add."""
    branch_1 = rounded(_normed(x_1, weight_1, rstd_1, OFFSET_1, PLAN_1), BRANCH)
    branch_2 = rounded(_normed(x_2, weight_2, rstd_2, OFFSET_2, PLAN_2), BRANCH)
    return rounded(branch_1 + branch_2, BRANCH)


@triton.jit
def grad_of_sum(
    grad_y, total, weight, rstd, mean, grad_total_ptr, total_scale, cols, mask,
    OFFSET: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The gradient of the residual: of the sum, and of the norm of it where `grad_y` is one."""
    grad = load_wide(grad_total_ptr, cols, mask, WIDE)
    if grad_y is not None:
        grad += norm_gradient(weighted(grad_y, weight, OFFSET, WIDE), total * rstd, rstd, mean)
    return grad * total_scale


@triton.jit
def sums_of_two(products_1, products_2):
    """Both sums over a row: what lanes tell each other goes in one message, not in two."""
    sum_1, sum_2 = tl.split(tl.sum(tl.join(products_1, products_2), axis=1))
    return sum_1[:, None], sum_2[:, None]
