"""Gradients of RMSNorm, from x and the saved rstd: no float32 copy of an activation is kept.

With unit = x * rstd and g = grad_y * (weight + offset):

    grad_x      = (g - unit / N * sum(g * unit)) * rstd
    grad_weight = sum over rows of grad_y * unit

An L2 norm has no division by N. The formula is spelled as in Inductor's own decomposition of
`aten._fused_rms_norm_backward`, so that its fused reduction over both axes applies to the inline
form, too. Everything is formed in float32, or float64 where the statistic is, and rounded once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from normfuse.ops.layout import dense_like
from normfuse.ops.registration import register_gradient
from normfuse.ops.rounding import L2, RoundingPlan

SCHEMA = (
    "rms_norm_backward(Tensor grad_y, Tensor x, Tensor? weight, Tensor rstd, float offset,"
    " str plan, bool[2] output_mask) -> (Tensor grad_x, Tensor grad_weight)"
)

Gradient = torch.Tensor | None


def norm_gradients(
    grad_y: Gradient,
    grad_rstd: Gradient,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    rstd: torch.Tensor,
    offset: float,
    *,
    mean: str = "mean",
    output_mask: Sequence[bool] = (True, True),
) -> tuple[Any, Gradient]:
    """Gradients of x (wide, unrounded) and weight (in its type); None where not in the mask.

    `grad_rstd` adds -grad_rstd * rstd^3 * x / N to the gradient of x.
    """
    wide = accumulation_dtype(rstd.dtype)
    rstd = rstd.to(wide)
    unit = x.to(wide) * rstd
    divisor = 1 if mean == L2 else x.shape[-1]
    grad_x = grad_weight = None
    if grad_y is not None:
        g = grad_y.to(wide)
        if output_mask[1] and weight is not None:
            grad_weight = _sum_over_rows(g * unit).to(weight.dtype)
        if output_mask[0]:
            if weight is not None:
                g = g * (weight.to(wide) + offset if offset else weight.to(wide))
            share = unit if mean == L2 else unit / divisor
            grad_x = (g - share * (unit * g).sum(-1, keepdim=True)) * rstd
    if not output_mask[0]:
        return None, grad_weight
    if grad_x is None:
        grad_x = torch.zeros_like(unit)
    if grad_rstd is not None:
        grad_x = grad_x - grad_rstd.to(wide) * rstd.square() * unit / divisor
    return grad_x, grad_weight


def accumulation_dtype(compute: torch.dtype) -> torch.dtype:
    """The type in which gradients of a statistic of type `compute` are formed and summed."""
    return torch.promote_types(compute, torch.float32)


def _sum_over_rows(value: torch.Tensor) -> torch.Tensor:
    rows = tuple(range(value.dim() - 1))
    return value.sum(rows) if rows else value


def laid_out(value: torch.Tensor, like: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`value` rounded to `dtype` and laid out as `torch.empty_like(like)`."""
    return dense_like(value.to(dtype), torch.empty_like(like, dtype=dtype))


def empty_gradient(is_wanted: bool, like: torch.Tensor | None, dtype: torch.dtype) -> Any:
    """The fake of a gradient laid out like a value; None if it is not wanted."""
    return torch.empty_like(like, dtype=dtype) if is_wanted and like is not None else None


def empty_weight_gradient(is_wanted: bool, weight: torch.Tensor | None) -> Any:
    """The fake of a weight's gradient; None if it is not wanted."""
    return weight.new_empty(weight.shape) if is_wanted and weight is not None else None


def rms_norm_backward_reference(
    grad_y: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    rstd: torch.Tensor,
    offset: float,
    plan: str,
    output_mask: Sequence[bool],
) -> tuple[Gradient, Gradient]:
    """The meaning: grad_y, x (..., N), weight (N,) or None, rstd (..., 1) -> grad_x, grad_weight.

    They have the types of x and weight; a gradient that is not in the mask is None.
    """
    mean = RoundingPlan.parse(plan).mean
    grad_x, grad_weight = norm_gradients(
        grad_y, None, x, weight, rstd, offset, mean=mean, output_mask=output_mask
    )
    return None if grad_x is None else laid_out(grad_x, x, x.dtype), grad_weight


def rms_norm_backward_fake(
    grad_y: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    rstd: torch.Tensor,
    offset: float,
    plan: str,
    output_mask: Sequence[bool],
) -> tuple[Gradient, Gradient]:
    return (
        empty_gradient(output_mask[0], x, x.dtype),
        empty_weight_gradient(output_mask[1], weight),
    )


def _cuda(
    grad_y: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    rstd: torch.Tensor,
    offset: float,
    plan: str,
    output_mask: Sequence[bool],
) -> Any:
    from normfuse.ops.kernels.rms_norm_backward import launch

    return launch(grad_y, x, weight, rstd, offset, RoundingPlan.parse(plan), output_mask)


RMS_NORM_BACKWARD = register_gradient(
    SCHEMA, reference=rms_norm_backward_reference, fake=rms_norm_backward_fake, cuda=_cuda
)
