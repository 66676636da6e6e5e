"""The sandwich: RMSNorm, residual add, RMSNorm; total = residual + norm_1(x), y = norm_2(total).

Gemma 2 and 3, GLM 4: the norm after a branch, the add, and the norm before the next branch, across
layers too. Gemma 4 scales the sum by a buffer (`total_scale_tensor`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from normfuse.ops.registration import needs_plain_torch, register
from normfuse.ops.residual_sum import SCALE_SCHEMA, Scales, residual_sum_backward
from normfuse.ops.rms_norm import (
    check_plan,
    rms_norm_fake,
    rms_norm_reference,
)
from normfuse.ops.rms_norm_add import rms_norm_add_fake, rms_norm_add_reference
from normfuse.ops.rms_norm_add_rms_norm_backward import RMS_NORM_ADD_RMS_NORM_BACKWARD
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
    "rms_norm_add_rms_norm(Tensor x, Tensor residual, Tensor? weight_1, Tensor? weight_2,"
    f" {SCALE_SCHEMA}, float eps_1, float offset_1, str plan_1,"
    " float eps_2, float offset_2, str plan_2)"
    " -> (Tensor y, Tensor total, Tensor rstd_1, Tensor rstd_2)"
)


class RMSNormAddRMSNorm(NamedTuple):
    """Results of `rms_norm_add_rms_norm`: the normalised sum and the sum itself, (..., N) both."""

    y: torch.Tensor
    total: torch.Tensor


def rms_norm_add_rms_norm_reference(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight_1: torch.Tensor | None,
    weight_2: torch.Tensor | None,
    branch_scale_tensor: torch.Tensor | None,
    total_scale_tensor: torch.Tensor | None,
    branch_scale: float | None,
    total_scale: float | None,
    eps_1: float,
    offset_1: float,
    plan_1: str,
    eps_2: float,
    offset_2: float,
    plan_2: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The meaning: x, residual (..., N), weights (N,) -> y, total (..., N), rstd (..., 1) twice."""
    scales = (branch_scale_tensor, total_scale_tensor, branch_scale, total_scale)
    total, rstd_1 = rms_norm_add_reference(x, residual, weight_1, *scales, eps_1, offset_1, plan_1)
    y, rstd_2 = rms_norm_reference(total, weight_2, None, eps_2, offset_2, plan_2)
    return y, total, rstd_1, rstd_2


def rms_norm_add_rms_norm_fake(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight_1: torch.Tensor | None,
    weight_2: torch.Tensor | None,
    *arguments: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    scales, norm_1, norm_2 = arguments[:4], arguments[4:7], arguments[7:]
    total, rstd_1 = rms_norm_add_fake(x, residual, weight_1, *scales, *norm_1)
    y, rstd_2 = rms_norm_fake(total, weight_2, None, *norm_2)
    return y, total, rstd_1, rstd_2


def _cuda(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight_1: torch.Tensor | None,
    weight_2: torch.Tensor | None,
    *arguments: Any,
) -> Any:
    from normfuse.ops.kernels.rms_norm_add_rms_norm import launch

    eps_1, offset_1, plan_1, eps_2, offset_2, plan_2 = arguments[4:]
    return launch(
        x,
        residual,
        weight_1,
        weight_2,
        Scales(*arguments[:4]),
        eps_1,
        offset_1,
        RoundingPlan.parse(plan_1),
        eps_2,
        offset_2,
        RoundingPlan.parse(plan_2),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    x, residual, weight_1, weight_2, branch_tensor, total_tensor, *numbers = inputs
    branch, total_number, eps_1, offset_1, plan_1, _, offset_2, plan_2 = numbers
    scales = Scales(branch_tensor, total_tensor, branch, total_number)
    operand = residual if scales.learn() else None
    weights = (weight_1, weight_2)
    ctx.save_for_backward(x, operand, *weights, branch_tensor, total_tensor, *output[1:])
    ctx.numbers = (branch, total_number)
    ctx.eps_1 = eps_1
    ctx.norms = (offset_1, plan_1, offset_2, plan_2)
    ctx.dtype = residual.dtype
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any,
    grad_y: torch.Tensor | None,
    grad_total: torch.Tensor | None,
    grad_rstd_1: torch.Tensor | None,
    grad_rstd_2: torch.Tensor | None,
) -> Any:
    x, residual, weight_1, weight_2, branch_tensor, total_tensor, *saved = ctx.saved_tensors
    total, rstd_1, rstd_2 = saved
    grad_rstds = (grad_rstd_1, grad_rstd_2)
    is_plain = residual is not None or any(grad is not None for grad in grad_rstds)
    if grad_y is None or is_plain or needs_plain_torch():
        return _plain_gradients(ctx, grad_y, grad_total, *grad_rstds)
    scales = Scales(branch_tensor, total_tensor, *ctx.numbers)
    grads = RMS_NORM_ADD_RMS_NORM_BACKWARD(
        grad_y, grad_total, x, total, weight_1, weight_2, rstd_1, rstd_2, *scales, *ctx.norms,
        ctx.dtype, list(ctx.needs_input_grad[:4]),
    )  # fmt: skip
    return *grads, *(None,) * 10


def _plain_gradients(
    ctx: Any,
    grad_y: torch.Tensor | None,
    grad_total: torch.Tensor | None,
    grad_rstd_1: torch.Tensor | None,
    grad_rstd_2: torch.Tensor | None,
) -> Any:
    x, residual, weight_1, weight_2, branch_tensor, total_tensor, *saved = ctx.saved_tensors
    total, rstd_1, rstd_2 = saved
    offset_1, plan_1, offset_2, _ = ctx.norms
    grad, grad_weight_2 = norm_gradients(grad_y, grad_rstd_2, total, weight_2, rstd_2, offset_2)
    if grad_total is not None:
        grad = grad + grad_total
    branch = None
    if residual is not None:
        branch, _ = rms_norm_reference(x, weight_1, None, ctx.eps_1, offset_1, plan_1)
    scales = Scales(branch_tensor, total_tensor, *ctx.numbers)
    grads = residual_sum_backward(grad, branch, residual, scales)
    grad_x, grad_weight_1 = norm_gradients(grads.branch, grad_rstd_1, x, weight_1, rstd_1, offset_1)
    return (
        grad_x.to(x.dtype),
        grads.residual.to(ctx.dtype),
        grad_weight_1,
        grad_weight_2,
        grads.branch_tensor,
        grads.total_tensor,
        *(None,) * 8,
    )


RMS_NORM_ADD_RMS_NORM = register(
    SCHEMA,
    reference=rms_norm_add_rms_norm_reference,
    fake=rms_norm_add_rms_norm_fake,
    cuda=_cuda,
    setup_context=_setup_context,
    backward=_backward,
)


def rms_norm_add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight_1: torch.Tensor | None = None,
    weight_2: torch.Tensor | None = None,
    eps_1: float = 1e-6,
    eps_2: float | None = None,
    *,
    offset_1: float = 0.0,
    offset_2: float | None = None,
    branch_scale: float | torch.Tensor | None = None,
    total_scale: float | torch.Tensor | None = None,
    plan_1: RoundingPlan | None = None,
    plan_2: RoundingPlan | None = None,
) -> RMSNormAddRMSNorm:
    """total = (residual + RMSNorm_1(x) * branch_scale) * total_scale; y = RMSNorm_2(total).

    Args:
        x: (..., N), float16, bfloat16, float32 or float64; the output of the branch.
        residual: (..., N), any of these types; the residual stream.
        weight_1: (N,) or None; the weight of the norm of x.
        weight_2: (N,) or None; the weight of the norm of the sum.
        eps_1: added to the mean of the squares of x.
        eps_2: the same for the sum; by default eps_1.
        offset_1: added to weight_1; 1.0 for Gemma's norms.
        offset_2: added to weight_2; by default offset_1.
        branch_scale: a number or a tensor of one element that multiplies the first norm.
        total_scale: a number or a tensor of one element that multiplies the sum.
        plan_1: where the first norm rounds; by default once, at its end.
        plan_2: where the second norm rounds; by default once, at its end.

    Returns:
        `RMSNormAddRMSNorm(y, total)`: y (..., N) in `plan_2.out`, total (..., N) in the promoted
        type.

    Raises:
        TypeError, ValueError: a type, shape or device does not fit.
    """
    check_activation("x", x)
    check_residual(residual, x)
    for name, weight in (("weight_1", weight_1), ("weight_2", weight_2)):
        check_weight(name, weight, x)
    eps_2 = eps_1 if eps_2 is None else eps_2
    offset_2 = offset_1 if offset_2 is None else offset_2
    check_eps("eps_1", eps_1)
    check_eps("eps_2", eps_2)
    check_scale("branch_scale", branch_scale, x)
    check_scale("total_scale", total_scale, x)
    if plan_1 is None:
        plan_1 = RoundingPlan.once(x.dtype, None if weight_1 is None else weight_1.dtype)
    if plan_2 is None:
        total_dtype = torch.promote_types(plan_1.out, residual.dtype)
        plan_2 = RoundingPlan.once(total_dtype, None if weight_2 is None else weight_2.dtype)
    check_plan("plan_1", plan_1, weight_1)
    check_plan("plan_2", plan_2, weight_2)
    y, total, _, _ = RMS_NORM_ADD_RMS_NORM(
        x,
        residual,
        weight_1,
        weight_2,
        *Scales.of(branch_scale, total_scale),
        eps_1,
        offset_1,
        str(plan_1),
        eps_2,
        offset_2,
        str(plan_2),
    )
    return RMSNormAddRMSNorm(y, total)
