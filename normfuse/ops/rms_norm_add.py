"""RMSNorm, then residual add: total = residual + norm(x).

The post-norm block of OLMo 2, and the end of a Gemma layer. The factors of `residual_sum` may scale
the norm (HyperCLOVA) and the sum (Gemma 4's layer scalar).
"""

from __future__ import annotations

from typing import Any

import torch

from normfuse.ops.registration import needs_plain_torch, register
from normfuse.ops.residual_sum import SCALE_SCHEMA, Scales, residual_sum, residual_sum_backward
from normfuse.ops.rms_norm import (
    check_plan,
    gradients,
    rms_norm_fake,
    rms_norm_reference,
)
from normfuse.ops.rms_norm_add_backward import RMS_NORM_ADD_BACKWARD
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
    f"rms_norm_add(Tensor x, Tensor residual, Tensor? weight, {SCALE_SCHEMA},"
    " float eps, float offset, str plan) -> (Tensor total, Tensor rstd)"
)


def rms_norm_add_reference(
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
) -> tuple[torch.Tensor, torch.Tensor]:
    """The meaning: x, residual (..., N), weight (N,) or None -> total (..., N), rstd (..., 1)."""
    branch, rstd = rms_norm_reference(x, weight, None, eps, offset, plan)
    scales = Scales(branch_scale_tensor, total_scale_tensor, branch_scale, total_scale)
    return residual_sum(branch, residual, scales), rstd


def rms_norm_add_fake(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor | None, *arguments: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    *scales, eps, offset, plan = arguments
    branch, rstd = rms_norm_fake(x, weight, None, eps, offset, plan)
    return residual_sum(branch, residual, Scales(*scales)), rstd


def _cuda(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor | None, *arguments: Any
) -> Any:
    from normfuse.ops.kernels.rms_norm_add import launch

    *scales, eps, offset, plan = arguments
    return launch(x, residual, weight, Scales(*scales), eps, offset, RoundingPlan.parse(plan))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    x, residual, weight, branch_tensor, total_tensor, branch, total, eps, offset, plan = inputs
    scales = Scales(branch_tensor, total_tensor, branch, total)
    operand = residual if scales.learn() else None
    ctx.save_for_backward(x, operand, weight, branch_tensor, total_tensor, output[1])
    ctx.numbers = (branch, total)
    ctx.norm = (eps, offset, plan)
    ctx.dtypes = (residual.dtype, output[0].dtype)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_total: torch.Tensor | None, grad_rstd: torch.Tensor | None) -> Any:
    x, residual, weight, branch_tensor, total_tensor, rstd = ctx.saved_tensors
    _, offset, plan = ctx.norm
    scales = Scales(branch_tensor, total_tensor, *ctx.numbers)
    wants_x, wants_residual, wants_weight = ctx.needs_input_grad[:3]
    if grad_total is None:
        norm = (weight, rstd, offset, plan, (wants_x, wants_weight))
        grad_x, grad_weight = gradients(None, grad_rstd, x, *norm)
        return grad_x, None, grad_weight, *(None,) * 7
    if grad_rstd is not None or residual is not None or needs_plain_torch():
        return _plain_gradients(ctx, grad_total, grad_rstd)
    passes = ctx.dtypes[0] == ctx.dtypes[1] and not scales.scale_total()
    grad_x, grad_residual, grad_weight = RMS_NORM_ADD_BACKWARD(
        grad_total, x, weight, rstd, *scales, offset, plan, ctx.dtypes[0],
        [wants_x, wants_residual and not passes, wants_weight],
    )  # fmt: skip
    return grad_x, grad_total if passes else grad_residual, grad_weight, *(None,) * 7


def _plain_gradients(ctx: Any, grad_total: torch.Tensor, grad_rstd: torch.Tensor | None) -> Any:
    x, residual, weight, branch_tensor, total_tensor, rstd = ctx.saved_tensors
    eps, offset, plan = ctx.norm
    scales = Scales(branch_tensor, total_tensor, *ctx.numbers)
    branch = None
    if residual is not None:
        branch, _ = rms_norm_reference(x, weight, None, eps, offset, plan)
    grads = residual_sum_backward(grad_total, branch, residual, scales)
    grad_x, grad_weight = norm_gradients(grads.branch, grad_rstd, x, weight, rstd, offset)
    return (
        grad_x.to(x.dtype),
        grads.residual.to(ctx.dtypes[0]),
        grad_weight,
        grads.branch_tensor,
        grads.total_tensor,
        *(None,) * 5,
    )


RMS_NORM_ADD = register(
    SCHEMA,
    reference=rms_norm_add_reference,
    fake=rms_norm_add_fake,
    cuda=_cuda,
    setup_context=_setup_context,
    backward=_backward,
)


def rms_norm_add(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    *,
    offset: float = 0.0,
    branch_scale: float | torch.Tensor | None = None,
    total_scale: float | torch.Tensor | None = None,
    plan: RoundingPlan | None = None,
) -> torch.Tensor:
    """total = (residual + RMSNorm(x) * branch_scale) * total_scale.

    Args:
        x: (..., N), float16, bfloat16, float32 or float64; the output of the branch.
        residual: (..., N), any of these types; the residual stream.
        weight: (N,) or None for a weightless norm.
        eps: added to the mean of the squares.
        offset: added to the weight; 1.0 for Gemma's norms.
        branch_scale: a number or a tensor of one element that multiplies the norm.
        total_scale: a number or a tensor of one element that multiplies the sum.
        plan: where the norm rounds; by default once, at its end. The sum rounds to the promoted
            type.

    Returns:
        total (..., N) in the type that torch promotes `plan.out` and the residual's type to.

    Raises:
        TypeError, ValueError: a type, shape or device does not fit.
    """
    check_activation("x", x)
    check_residual(residual, x)
    check_weight("weight", weight, x)
    check_eps("eps", eps)
    check_scale("branch_scale", branch_scale, x)
    check_scale("total_scale", total_scale, x)
    steps = plan or RoundingPlan.once(x.dtype, None if weight is None else weight.dtype)
    check_plan("plan", steps, weight)
    scales = Scales.of(branch_scale, total_scale)
    total: torch.Tensor = RMS_NORM_ADD(x, residual, weight, *scales, eps, offset, str(steps))[0]
    return total
