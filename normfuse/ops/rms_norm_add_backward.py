"""Gradients of RMSNorm and residual add.

With norm' as in `rms_norm_backward`:

    grad_residual = grad_total * total_scale
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
    accumulation_dtype,
    empty_gradient,
    empty_weight_gradient,
    laid_out,
    norm_gradients,
)
from normfuse.ops.rounding import RoundingPlan

SCHEMA = (
    "rms_norm_add_backward(Tensor grad_total, Tensor x, Tensor? weight, Tensor rstd,"
    f" {SCALE_SCHEMA}, float offset, str plan, ScalarType residual_dtype, bool[3] output_mask)"
    " -> (Tensor grad_x, Tensor grad_residual, Tensor grad_weight)"
)


def rms_norm_add_backward_reference(
    grad_total: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    rstd: torch.Tensor,
    branch_scale_tensor: torch.Tensor | None,
    total_scale_tensor: torch.Tensor | None,
    branch_scale: float | None,
    total_scale: float | None,
    offset: float,
    plan: str,
    residual_dtype: torch.dtype,
    output_mask: Sequence[bool],
) -> tuple[Gradient, Gradient, Gradient]:
    """The meaning: grad_total, x (..., N), weight (N,), rstd (..., 1) -> three gradients.

    Without a total scale, the gradient of a residual of the sum's type is `grad_total` itself: do
    not ask for it.
    """
    grad_residual = grad_total.to(accumulation_dtype(rstd.dtype))
    grad_residual = scaled(grad_residual, total_scale, total_scale_tensor)
    grad_branch = scaled(grad_residual, branch_scale, branch_scale_tensor)
    mask = (output_mask[0], output_mask[2])
    grad_x, grad_weight = norm_gradients(
        grad_branch, None, x, weight, rstd, offset, output_mask=mask
    )
    return (
        None if grad_x is None else laid_out(grad_x, x, x.dtype),
        laid_out(grad_residual, x, residual_dtype) if output_mask[1] else None,
        grad_weight,
    )


def rms_norm_add_backward_fake(
    grad_total: torch.Tensor, x: torch.Tensor, weight: torch.Tensor | None, *arguments: Any
) -> tuple[Gradient, Gradient, Gradient]:
    residual_dtype, output_mask = arguments[-2:]
    return (
        empty_gradient(output_mask[0], x, x.dtype),
        empty_gradient(output_mask[1], x, residual_dtype),
        empty_weight_gradient(output_mask[2], weight),
    )


def _cuda(
    grad_total: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    rstd: torch.Tensor,
    *arguments: Any,
) -> Any:
    from normfuse.ops.kernels.rms_norm_add_backward import launch

    *scales, offset, plan, residual_dtype, output_mask = arguments
    steps, factors = RoundingPlan.parse(plan), Scales(*scales)
    return launch(grad_total, x, weight, rstd, factors, offset, steps, residual_dtype, output_mask)


RMS_NORM_ADD_BACKWARD = register_gradient(
    SCHEMA, reference=rms_norm_add_backward_reference, fake=rms_norm_add_backward_fake, cuda=_cuda
)
