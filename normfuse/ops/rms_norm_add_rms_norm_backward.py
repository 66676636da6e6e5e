"""Gradients of the sandwich, in one pass: RMSNorm, residual add, RMSNorm.

With norm' as in `rms_norm_backward`:

    grad          = norm'(grad_y; total) + grad_total
    grad_residual = grad * total_scale
    grad_x        = norm'(grad_residual * branch_scale; x)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from normfuse.ops.registration import register_gradient
from normfuse.ops.residual_sum import SCALE_SCHEMA, Scales, scaled
from normfuse.ops.rms_norm_backward import (
    Gradient,
    empty_gradient,
    empty_weight_gradient,
    laid_out,
    norm_gradients,
)
from normfuse.ops.rounding import RoundingPlan

SCHEMA = (
    "rms_norm_add_rms_norm_backward(Tensor grad_y, Tensor? grad_total, Tensor x, Tensor total,"
    f" Tensor? weight_1, Tensor? weight_2, Tensor rstd_1, Tensor rstd_2, {SCALE_SCHEMA},"
    " float offset_1, str plan_1, float offset_2, str plan_2, ScalarType residual_dtype,"
    " bool[4] output_mask) -> (Tensor grad_x, Tensor grad_residual, Tensor grad_weight_1,"
    " Tensor grad_weight_2)"
)


def rms_norm_add_rms_norm_backward_reference(
    grad_y: torch.Tensor,
    grad_total: torch.Tensor | None,
    x: torch.Tensor,
    total: torch.Tensor,
    weight_1: torch.Tensor | None,
    weight_2: torch.Tensor | None,
    rstd_1: torch.Tensor,
    rstd_2: torch.Tensor,
    branch_scale_tensor: torch.Tensor | None,
    total_scale_tensor: torch.Tensor | None,
    branch_scale: float | None,
    total_scale: float | None,
    offset_1: float,
    plan_1: str,
    offset_2: float,
    plan_2: str,
    residual_dtype: torch.dtype,
    output_mask: Sequence[bool],
) -> tuple[Gradient, Gradient, Gradient, Gradient]:
    """The meaning: grad_y, grad_total, x, total (..., N), two rstd (..., 1) -> four gradients."""
    wants_x, wants_residual, wants_weight_1, wants_weight_2 = output_mask
    mask_2 = (wants_x or wants_residual or wants_weight_1, wants_weight_2)
    grad, grad_weight_2 = norm_gradients(
        grad_y, None, total, weight_2, rstd_2, offset_2, output_mask=mask_2
    )
    if grad is None:
        return None, None, None, grad_weight_2
    if grad_total is not None:
        grad = grad + grad_total
    grad_residual = scaled(grad, total_scale, total_scale_tensor)
    grad_branch = scaled(grad_residual, branch_scale, branch_scale_tensor)
    grad_x, grad_weight_1 = norm_gradients(
        grad_branch, None, x, weight_1, rstd_1, offset_1, output_mask=(wants_x, wants_weight_1)
    )
    return (
        None if grad_x is None else laid_out(grad_x, x, x.dtype),
        laid_out(grad_residual, total, residual_dtype) if wants_residual else None,
        grad_weight_1,
        grad_weight_2,
    )


def rms_norm_add_rms_norm_backward_fake(
    grad_y: torch.Tensor,
    grad_total: torch.Tensor | None,
    x: torch.Tensor,
    total: torch.Tensor,
    weight_1: torch.Tensor | None,
    weight_2: torch.Tensor | None,
    *arguments: Any,
) -> tuple[Gradient, Gradient, Gradient, Gradient]:
    residual_dtype, output_mask = arguments[-2:]
    return (
        empty_gradient(output_mask[0], x, x.dtype),
        empty_gradient(output_mask[1], total, residual_dtype),
        empty_weight_gradient(output_mask[2], weight_1),
        empty_weight_gradient(output_mask[3], weight_2),
    )


def _cuda(*arguments: Any) -> Any:
    from normfuse.ops.kernels.rms_norm_add_rms_norm_backward import launch

    return launch(*gathered(arguments))


def gathered(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """The op's arguments as the kernel's launcher takes them: norms and scales gathered."""
    grad_y, grad_total, x, total, weight_1, weight_2, rstd_1, rstd_2, *scales = arguments[:12]
    offset_1, plan_1, offset_2, plan_2, residual_dtype, output_mask = arguments[12:]
    norms = (
        (weight_1, rstd_1, offset_1, RoundingPlan.parse(plan_1)),
        (weight_2, rstd_2, offset_2, RoundingPlan.parse(plan_2)),
    )
    return grad_y, grad_total, x, total, norms, Scales(*scales), residual_dtype, output_mask


RMS_NORM_ADD_RMS_NORM_BACKWARD = register_gradient(
    SCHEMA,
    reference=rms_norm_add_rms_norm_backward_reference,
    fake=rms_norm_add_rms_norm_backward_fake,
    cuda=_cuda,
)
