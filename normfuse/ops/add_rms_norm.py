"""Residual add, then RMSNorm: total = residual + x, y = norm(total); both results are used.

The pre-norm block of Llama and its relatives. The factors of `residual_sum` may scale x and the sum
(Granite).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from normfuse.ops.add_rms_norm_backward import ADD_RMS_NORM_BACKWARD
from normfuse.ops.registration import needs_plain_torch, register
from normfuse.ops.residual_sum import SCALE_SCHEMA, Scales, residual_sum, residual_sum_backward
from normfuse.ops.rms_norm import (
    check_plan,
    rms_norm_fake,
    rms_norm_reference,
)
from normfuse.ops.rms_norm_backward import norm_gradients
from normfuse.ops.rounding import RoundingPlan
from normfuse.ops.validation import (
    check_activation,
    check_eps,
    check_residual,
    check_scale,
    check_weight,
)

SCHEMA = (
    f"add_rms_norm(Tensor x, Tensor residual, Tensor? weight, {SCALE_SCHEMA},"
    " float eps, float offset, str plan) -> (Tensor y, Tensor total, Tensor rstd)"
)


class AddRMSNorm(NamedTuple):
    """Results of `add_rms_norm`: the normalised sum and the sum itself, (..., N) both."""

    y: torch.Tensor
    total: torch.Tensor


def add_rms_norm_reference(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None,
    branch_scale_tensor: torch.Tensor | None,
    total_scale_tensor: torch.Tensor | None,
    branch_scale: float | None,
    total_scale: float | None,
    eps: float,
    offset: float,
    plan: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The meaning: x, residual (..., N), weight (N,) -> y, total (..., N), rstd (..., 1)."""
    scales = Scales(branch_scale_tensor, total_scale_tensor, branch_scale, total_scale)
    total = residual_sum(x, residual, scales)
    y, rstd = rms_norm_reference(total, weight, None, eps, offset, plan)
    return y, total, rstd


def add_rms_norm_fake(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor | None, *arguments: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    *scales, eps, offset, plan = arguments
    total = residual_sum(x, residual, Scales(*scales))
    y, rstd = rms_norm_fake(total, weight, None, eps, offset, plan)
    return y, total, rstd


def _cuda(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor | None, *arguments: Any
) -> Any:
    from normfuse.ops.kernels.add_rms_norm import launch

    *scales, eps, offset, plan = arguments
    return launch(x, residual, weight, Scales(*scales), eps, offset, RoundingPlan.parse(plan))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    x, residual, weight, branch_tensor, total_tensor, branch, total_number, _, offset, plan = inputs
    _, total, rstd = output
    scales = Scales(branch_tensor, total_tensor, branch, total_number)
    operands = (x, residual) if scales.learn() else (None, None)
    ctx.save_for_backward(*operands, weight, branch_tensor, total_tensor, total, rstd)
    ctx.numbers = (branch, total_number)
    ctx.norm = (offset, plan)
    ctx.dtypes = (x.dtype, residual.dtype)
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any,
    grad_y: torch.Tensor | None,
    grad_total: torch.Tensor | None,
    grad_rstd: torch.Tensor | None,
) -> Any:
    x, _, weight, branch_tensor, total_tensor, total, rstd = ctx.saved_tensors
    scales = Scales(branch_tensor, total_tensor, *ctx.numbers)
    if grad_y is None or grad_rstd is not None or x is not None or needs_plain_torch():
        return _plain_gradients(ctx, grad_y, grad_total, grad_rstd)
    wants_x, wants_residual, wants_weight = ctx.needs_input_grad[:3]
    is_shared = ctx.dtypes[0] == ctx.dtypes[1] and not scales.scale_branch()
    mask = [wants_x or (is_shared and wants_residual), wants_residual and not is_shared]
    grad_x, grad_residual, grad_weight = ADD_RMS_NORM_BACKWARD(
        grad_y, grad_total, total, weight, rstd, *scales, *ctx.norm, *ctx.dtypes,
        [*mask, wants_weight],
    )  # fmt: skip
    return grad_x, grad_x if is_shared else grad_residual, grad_weight, *(None,) * 7


def _plain_gradients(
    ctx: Any,
    grad_y: torch.Tensor | None,
    grad_total: torch.Tensor | None,
    grad_rstd: torch.Tensor | None,
) -> Any:
    x, residual, weight, branch_tensor, total_tensor, total, rstd = ctx.saved_tensors
    grad, grad_weight = norm_gradients(grad_y, grad_rstd, total, weight, rstd, ctx.norm[0])
    if grad_total is not None:
        grad = grad + grad_total
    scales = Scales(branch_tensor, total_tensor, *ctx.numbers)
    grads = residual_sum_backward(grad, x, residual, scales)
    return (
        grads.branch.to(ctx.dtypes[0]),
        grads.residual.to(ctx.dtypes[1]),
        grad_weight,
        grads.branch_tensor,
        grads.total_tensor,
        *(None,) * 5,
    )


ADD_RMS_NORM = register(
    SCHEMA,
    reference=add_rms_norm_reference,
    fake=add_rms_norm_fake,
    cuda=_cuda,
    setup_context=_setup_context,
    backward=_backward,
)


def add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    *,
    offset: float = 0.0,
    branch_scale: float | torch.Tensor | None = None,
    total_scale: float | torch.Tensor | None = None,
    plan: RoundingPlan | None = None,
) -> AddRMSNorm:
    """total = (residual + x * branch_scale) * total_scale; y = RMSNorm(total).

    Args:
        x: (..., N), float16, bfloat16, float32 or float64; the output of the branch.
        residual: (..., N), any of these types; the residual stream.
        weight: (N,) or None for a weightless norm.
        eps: added to the mean of the squares.
        offset: added to the weight; 1.0 for Gemma's norms.
        branch_scale: a number or a tensor of one element that multiplies x.
        total_scale: a number or a tensor of one element that multiplies the sum.
        plan: where the norm rounds; by default once, at the end. The sum rounds to the promoted
            type.

    Returns:
        `AddRMSNorm(y, total)`: y (..., N) in `plan.out`, total (..., N) in the promoted type.

    Raises:
        TypeError, ValueError: a type, shape or device does not fit.
    """
    check_activation("x", x)
    check_residual(residual, x)
    check_weight("weight", weight, x)
    check_eps("eps", eps)
    check_scale("branch_scale", branch_scale, x)
    check_scale("total_scale", total_scale, x)
    scales = Scales.of(branch_scale, total_scale)
    if plan is None:
        total_dtype = torch.promote_types(x.dtype, residual.dtype)
        plan = RoundingPlan.once(total_dtype, None if weight is None else weight.dtype)
    check_plan("plan", plan, weight)
    y, total, _ = ADD_RMS_NORM(x, residual, weight, *scales, eps, offset, str(plan))
    return AddRMSNorm(y, total)
