"""The end of a layer with two branches, and the norm that begins the next:

    total = residual + norm_3(norm_1(x_1) + norm_2(x_2)),  y = norm_4(total)

Gemma 4's layers with experts. The sum is that of `dual_rms_norm_add`, its factors included.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from normfuse.ops.dual_rms_norm_add import (
    checked_plans,
    dual_rms_norm_add_fake,
    dual_rms_norm_add_reference,
    gathered,
    gradients,
    parsed,
    plain_gradients,
    saved_inputs,
    split_norms,
)
from normfuse.ops.dual_rms_norm_add_rms_norm_backward import DUAL_RMS_NORM_ADD_RMS_NORM_BACKWARD
from normfuse.ops.registration import needs_plain_torch, register
from normfuse.ops.residual_sum import SCALE_SCHEMA, Scales
from normfuse.ops.rms_norm import rms_norm_fake, rms_norm_reference
from normfuse.ops.rms_norm_backward import norm_gradients
from normfuse.ops.rounding import RoundingPlan

SCHEMA = (
    "dual_rms_norm_add_rms_norm(Tensor x_1, Tensor x_2, Tensor residual,"
    f" Tensor? weight_1, Tensor? weight_2, Tensor? weight_3, Tensor? weight_4, {SCALE_SCHEMA},"
    " float eps_1, float offset_1, str plan_1, float eps_2, float offset_2, str plan_2,"
    " float eps_3, float offset_3, str plan_3, float eps_4, float offset_4, str plan_4)"
    " -> (Tensor y, Tensor total,"
    " Tensor rstd_1, Tensor rstd_2, Tensor rstd_3, Tensor rstd_4)"
)


class DualRMSNormAddRMSNorm(NamedTuple):
    """Results of `dual_rms_norm_add_rms_norm`: the normalised sum and the sum, (..., N) both."""

    y: torch.Tensor
    total: torch.Tensor


def dual_rms_norm_add_rms_norm_reference(
    x_1: torch.Tensor, x_2: torch.Tensor, residual: torch.Tensor, *arguments: Any
) -> tuple[torch.Tensor, ...]:
    """The meaning: x_1, x_2, residual (..., N) -> y, total (..., N), four rstd (..., 1).

    `arguments` are the rest of the schema.
    """
    *weights, weight_4 = arguments[:4]
    total, *rstds = dual_rms_norm_add_reference(x_1, x_2, residual, *weights, *arguments[4:-3])
    y, rstd_4 = rms_norm_reference(total, weight_4, None, *arguments[-3:])
    return y, total, *rstds, rstd_4


def dual_rms_norm_add_rms_norm_fake(
    x_1: torch.Tensor, x_2: torch.Tensor, residual: torch.Tensor, *arguments: Any
) -> tuple[torch.Tensor, ...]:
    *weights, weight_4 = arguments[:4]
    total, *rstds = dual_rms_norm_add_fake(x_1, x_2, residual, *weights, *arguments[4:-3])
    y, rstd_4 = rms_norm_fake(total, weight_4, None, *arguments[-3:])
    return y, total, *rstds, rstd_4


def _cuda(x_1: torch.Tensor, x_2: torch.Tensor, residual: torch.Tensor, *arguments: Any) -> Any:
    from normfuse.ops.kernels.dual_rms_norm_add_rms_norm import launch

    scales, *norms = split_norms(arguments[4:])
    return launch(x_1, x_2, residual, arguments[:4], Scales(*scales), parsed(norms))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    # Nine inputs, then total and the four rstd.
    ctx.save_for_backward(*saved_inputs(inputs, 4), *output[1:])
    ctx.numbers = inputs[9:]
    ctx.dtypes = (inputs[2].dtype, output[1].dtype)
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any,
    grad_y: torch.Tensor | None,
    grad_total: torch.Tensor | None,
    *grad_rstds: torch.Tensor | None,
) -> Any:
    x_1, x_2, residual, *weights, branch_tensor, total_tensor = ctx.saved_tensors[:9]
    total, *rstds = ctx.saved_tensors[9:]
    if residual is not None or any(g is not None for g in grad_rstds) or needs_plain_torch():
        return _plain_gradients(ctx, grad_y, grad_total, grad_rstds)
    wanted = ctx.needs_input_grad[:7]
    if grad_y is None:
        tensors = (x_1, x_2, residual, *weights[:3], branch_tensor, total_tensor)
        numbers = ctx.numbers[:-3]
        grads = gradients(grad_total, tensors, rstds[:3], numbers, ctx.dtypes, wanted[:6])
        return *grads[:6], *(None,) * 17
    scales, offsets, plans = gathered((branch_tensor, total_tensor, *ctx.numbers))
    present = [weight for weight in weights if weight is not None]
    grads = DUAL_RMS_NORM_ADD_RMS_NORM_BACKWARD(
        grad_y, grad_total, x_1, x_2, total, present, rstds, *scales, offsets, plans,
        ctx.dtypes[0], list(wanted),
    )  # fmt: skip
    return *grads, *(None,) * 16


def _plain_gradients(
    ctx: Any,
    grad_y: torch.Tensor | None,
    grad_total: torch.Tensor | None,
    grad_rstds: tuple[torch.Tensor | None, ...],
) -> Any:
    *tensors, total, rstd_1, rstd_2, rstd_3, rstd_4 = ctx.saved_tensors
    weight_4, offset_4 = tensors.pop(6), ctx.numbers[-2]
    grad, grad_weight_4 = norm_gradients(grad_y, grad_rstds[3], total, weight_4, rstd_4, offset_4)
    grads = plain_gradients(
        grad if grad_total is None else grad + grad_total,
        grad_rstds[:3],
        tuple(tensors),
        (rstd_1, rstd_2, rstd_3),
        ctx.numbers[:-3],
        ctx.dtypes[0],
    )
    return *grads[:6], grad_weight_4, *grads[6:], *(None,) * 14


DUAL_RMS_NORM_ADD_RMS_NORM = register(
    SCHEMA,
    reference=dual_rms_norm_add_rms_norm_reference,
    fake=dual_rms_norm_add_rms_norm_fake,
    cuda=_cuda,
    setup_context=_setup_context,
    backward=_backward,
)


def dual_rms_norm_add_rms_norm(
    x_1: torch.Tensor,
    x_2: torch.Tensor,
    residual: torch.Tensor,
    weights: Sequence[torch.Tensor | None] = (None, None, None, None),
    eps: float = 1e-6,
    *,
    offset: float = 0.0,
    branch_scale: float | torch.Tensor | None = None,
    total_scale: float | torch.Tensor | None = None,
    plans: Sequence[RoundingPlan] | None = None,
) -> DualRMSNormAddRMSNorm:
    """total as in `dual_rms_norm_add`; y = norm_4(total).

    Args:
        x_1: (..., N), float16, bfloat16, float32 or float64; the output of one branch.
        x_2: (..., N), any of these types; the output of the other.
        residual: (..., N), any of these types; the residual stream.
        weights: four of (N,), or None for a weightless norm.
        eps: added to the mean of the squares in every norm.
        offset: added to every weight.
        branch_scale: a number or a tensor of one element that multiplies the third norm.
        total_scale: a number or a tensor of one element that multiplies the sum.
        plans: where each norm rounds; by default once, at its end. Sums round to the promoted type.

    Returns:
        `DualRMSNormAddRMSNorm(y, total)`: y (..., N) in the out type of the fourth plan, total
        (..., N) in the promoted type.

    Raises:
        TypeError, ValueError: a type, shape, device or number of norms does not fit.
    """
    scales = (branch_scale, total_scale)
    steps = checked_plans(4, (x_1, x_2, residual), weights, eps, scales, plans)
    norms = [value for plan in steps for value in (eps, offset, str(plan))]
    y, total, *_ = DUAL_RMS_NORM_ADD_RMS_NORM(
        x_1, x_2, residual, *weights, *Scales.of(*scales), *norms
    )
    return DualRMSNormAddRMSNorm(y, total)
