"""Gradients of residual add and RMSNorm: the stream's own gradient is added in the same store.

With norm' as in `rms_norm_backward`:

    grad          = norm'(grad_y; total) + grad_total
    grad_residual = grad * total_scale
    grad_x        = grad_residual * branch_scale
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
    "add_rms_norm_backward(Tensor grad_y, Tensor? grad_total, Tensor total, Tensor? weight,"
    f" Tensor rstd, {SCALE_SCHEMA}, float offset, str plan, ScalarType x_dtype,"
    " ScalarType residual_dtype, bool[3] output_mask)"
    " -> (Tensor grad_x, Tensor grad_residual, Tensor grad_weight)"
)


def add_rms_norm_backward_reference(
    grad_y: torch.Tensor,
    grad_total: torch.Tensor | None,
    total: torch.Tensor,
    weight: torch.Tensor | None,
    rstd: torch.Tensor,
    branch_scale_tensor: torch.Tensor | None,
    total_scale_tensor: torch.Tensor | None,
    branch_scale: float | None,
    total_scale: float | None,
    offset: float,
    plan: str,
    x_dtype: torch.dtype,
    residual_dtype: torch.dtype,
    output_mask: Sequence[bool],
) -> tuple[Gradient, Gradient, Gradient]:
    """The meaning: grad_y, grad_total, total (..., N), rstd (..., 1) -> three gradients.

    Where x and residual have one type and no branch scale, their gradients are one: ask for that of
    x only.
    """
    mask = (output_mask[0] or output_mask[1], output_mask[2])
    grad, grad_weight = norm_gradients(grad_y, None, total, weight, rstd, offset, output_mask=mask)
    if grad is None:
        return None, None, grad_weight
    if grad_total is not None:
        grad = grad + grad_total
    grad_residual = scaled(grad, total_scale, total_scale_tensor)
    grad_x = scaled(grad_residual, branch_scale, branch_scale_tensor)
    return (
        laid_out(grad_x, total, x_dtype) if output_mask[0] else None,
        laid_out(grad_residual, total, residual_dtype) if output_mask[1] else None,
        grad_weight,
    )


def add_rms_norm_backward_fake(
    grad_y: torch.Tensor,
    grad_total: torch.Tensor | None,
    total: torch.Tensor,
    weight: torch.Tensor | None,
    *arguments: Any,
) -> tuple[Gradient, Gradient, Gradient]:
    x_dtype, residual_dtype, output_mask = arguments[-3:]
    return (
        empty_gradient(output_mask[0], total, x_dtype),
        empty_gradient(output_mask[1], total, residual_dtype),
        empty_weight_gradient(output_mask[2], weight),
    )


def _cuda(
    grad_y: torch.Tensor,
    grad_total: torch.Tensor | None,
    total: torch.Tensor,
    weight: torch.Tensor | None,
    rstd: torch.Tensor,
    *arguments: Any,
) -> Any:
    from normfuse.ops.kernels.add_rms_norm_backward import launch

    *scales, offset, plan, x_dtype, residual_dtype, output_mask = arguments
    return launch(
        grad_y,
        grad_total,
        total,
        weight,
        rstd,
        Scales(*scales),
        offset,
        RoundingPlan.parse(plan),
        (x_dtype, residual_dtype),
        output_mask,
    )


ADD_RMS_NORM_BACKWARD = register_gradient(
    SCHEMA, reference=add_rms_norm_backward_reference, fake=add_rms_norm_backward_fake, cuda=_cuda
)
