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

from normfuse.ops.kernels.constants import NAMES, SumTypes, norm_constants
from normfuse.ops.kernels.dual_rms_norm_add_rows import dual_rms_norm_add_kernel
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
