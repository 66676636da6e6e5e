"""Gradients of RMSNorm with a modulation, from x, scale and the saved rstd.

With norm' as in `rms_norm_backward` and n the normalised value:

    grad_shift = grad_y, summed over the rows that share a row of shift
    grad_scale = grad_y * n, likewise
    grad_x     = norm'(grad_y * (scale + scale_offset); x)

n is formed again in float32, or float64 where the statistic is: what the forward rounded on its way
is not rounded here. Sums are taken in that type, and rounded once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from normfuse.ops.modulation import modulating
from normfuse.ops.registration import register_gradient
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
    "modulated_rms_norm_backward(Tensor grad_y, Tensor x, Tensor scale, Tensor? shift,"
    " Tensor? weight, Tensor rstd, float offset, float scale_offset, str plan, bool[4] output_mask)"
    " -> (Tensor grad_x, Tensor grad_scale, Tensor grad_shift, Tensor grad_weight)"
)


def modulated_gradients(
    grad_y: Gradient,
    grad_rstd: Gradient,
    x: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor | None,
    weight: torch.Tensor | None,
    rstd: torch.Tensor,
    offset: float,
    scale_offset: float,
    output_mask: Sequence[bool],
) -> tuple[Gradient, Gradient, Gradient, Gradient]:
    """Gradients of x, scale, shift and weight, in their types; None where not in the mask.

    Without `grad_y`, only x has one.
    """
    wants_x, wants_scale, wants_shift, wants_weight = output_mask
    wide = accumulation_dtype(rstd.dtype)
    grad_scale = grad_shift = None
    if grad_y is not None:
        wide_grad = grad_y.to(wide)
        if wants_scale:
            value = x.to(wide) * rstd.to(wide)
            value = value if weight is None else value * (weight.to(wide) + offset)
            grad_scale = _summed(wide_grad * value, scale)
        if wants_shift and shift is not None:
            grad_shift = _summed(wide_grad, shift)
        grad_y = wide_grad * modulating(scale, scale_offset, wide)
    grad_x, grad_weight = norm_gradients(
        grad_y, grad_rstd, x, weight, rstd, offset, output_mask=(wants_x, wants_weight)
    )
    return None if grad_x is None else grad_x.to(x.dtype), grad_scale, grad_shift, grad_weight


def _summed(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """`value` summed over the rows that share one of `like`, in its type; new and contiguous."""
    total = value.sum_to_size(like.shape)
    return total.to(like.dtype, copy=True, memory_format=torch.contiguous_format)


def modulated_rms_norm_backward_reference(
    grad_y: torch.Tensor,
    x: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor | None,
    weight: torch.Tensor | None,
    rstd: torch.Tensor,
    offset: float,
    scale_offset: float,
    plan: str,
    output_mask: Sequence[bool],
) -> tuple[Gradient, Gradient, Gradient, Gradient]:
    """The meaning: grad_y, x (..., N), scale and shift that broadcast to it -> four gradients.

    Of `shift` only shape and type are read. The gradients have the types of x, scale, shift and
    weight; one that is not in the mask is None.
    """
    norm = (x, scale, shift, weight, rstd, offset, scale_offset)
    grads = modulated_gradients(grad_y, None, *norm, output_mask)
    return None if grads[0] is None else laid_out(grads[0], x, x.dtype), *grads[1:]


def modulated_rms_norm_backward_fake(
    grad_y: torch.Tensor,
    x: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor | None,
    weight: torch.Tensor | None,
    *arguments: Any,
) -> tuple[Gradient, Gradient, Gradient, Gradient]:
    output_mask = arguments[-1]
    return (
        empty_gradient(output_mask[0], x, x.dtype),
        empty_weight_gradient(output_mask[1], scale),
        empty_weight_gradient(output_mask[2], shift),
        empty_weight_gradient(output_mask[3], weight),
    )


def _cuda(
    grad_y: torch.Tensor,
    x: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor | None,
    weight: torch.Tensor | None,
    rstd: torch.Tensor,
    *arguments: Any,
) -> Any:
    from normfuse.ops.kernels.modulated_rms_norm_backward import launch

    offset, scale_offset, plan, output_mask = arguments
    norm = weight, rstd, offset, scale_offset, RoundingPlan.parse(plan)
    return launch(grad_y, x, scale, shift, *norm, output_mask)


MODULATED_RMS_NORM_BACKWARD = register_gradient(
    SCHEMA,
    reference=modulated_rms_norm_backward_reference,
    fake=modulated_rms_norm_backward_fake,
    cuda=_cuda,
)
