"""Gradients of RMSNorm with a gate, from x, gate and the saved rstd.

With norm' as in `rms_norm_backward`, taken of each group, and n the normalised value:

    grad_x    = norm'(grad_y * act(gate); x)                gate last
    grad_gate = grad_y * n * act'(gate)

    grad_value = norm'(grad_y; x * act(gate))               gate first
    grad_x     = grad_value * act(gate)
    grad_gate  = grad_value * x * act'(gate)

The gated value and n are formed again in float32, or float64 where the statistic is: what the
forward rounded on its way is not rounded here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from normfuse.ops.gating import activated, gate_slope
from normfuse.ops.groups import joined, split, weight_of_groups
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
    "gated_rms_norm_backward(Tensor grad_y, Tensor x, Tensor gate, Tensor? weight, Tensor rstd,"
    " float offset, int groups, bool gate_first, str activation, str plan, bool[3] output_mask)"
    " -> (Tensor grad_x, Tensor grad_gate, Tensor grad_weight)"
)


def gated_gradients(
    grad_y: Gradient,
    grad_rstd: Gradient,
    x: torch.Tensor,
    gate: torch.Tensor,
    weight: torch.Tensor | None,
    rstd: torch.Tensor,
    offset: float,
    groups: int,
    gate_first: bool,
    activation: str,
    output_mask: Sequence[bool],
) -> tuple[Gradient, Gradient, Gradient]:
    """Gradients of x, gate and weight, in their types; None where not in the mask.

    Without `grad_y`, a gate that comes last and the weight have none.
    """
    wants_x, wants_gate, wants_weight = output_mask
    wide = accumulation_dtype(rstd.dtype)
    wide_gate = gate.to(wide)
    factor, slope = activated(wide_gate, activation), gate_slope(wide_gate, activation)
    norm = (weight, rstd, offset, groups)
    if gate_first:
        mask = (wants_x or wants_gate, wants_weight)
        value = x.to(wide) * factor
        grad, grad_weight = _gradients_of_groups(grad_y, grad_rstd, value, *norm, mask)
        grad_x = None if grad is None else grad * factor
        grad_gate = None if grad is None else grad * x.to(wide) * slope
    else:
        mask, grad_gate = (wants_x, wants_weight), None
        if grad_y is not None:
            wide_grad = grad_y.to(wide)
            grad_gate = wide_grad * _normalised(x, *norm) * slope if wants_gate else None
            grad_y = wide_grad * factor
        grad_x, grad_weight = _gradients_of_groups(grad_y, grad_rstd, x, *norm, mask)
    return (
        grad_x.to(x.dtype) if wants_x and grad_x is not None else None,
        grad_gate.to(gate.dtype) if wants_gate and grad_gate is not None else None,
        grad_weight,
    )


def _normalised(
    x: torch.Tensor, weight: torch.Tensor | None, rstd: torch.Tensor, offset: float, groups: int
) -> torch.Tensor:
    """The result of the norm, not rounded."""
    wide = accumulation_dtype(rstd.dtype)
    value, factor = split(x, groups).to(wide) * rstd.to(wide), weight_of_groups(weight, x, groups)
    return joined(value if factor is None else value * (factor.to(wide) + offset), groups)


def _gradients_of_groups(
    grad_y: Gradient,
    grad_rstd: Gradient,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    rstd: torch.Tensor,
    offset: float,
    groups: int,
    output_mask: Sequence[bool],
) -> tuple[Gradient, Gradient]:
    """`norm_gradients` of a norm whose rows are groups, with a weight of all or of each."""
    wide = accumulation_dtype(rstd.dtype)
    rows, factor = split(x, groups), weight_of_groups(weight, x, groups)
    grad, grad_weight = None if grad_y is None else split(grad_y, groups), None
    if grad is not None and weight is not None and factor is not None and factor.dim() > 1:
        grad = grad.to(wide)
        if output_mask[1]:
            by_row = grad * rows.to(wide) * rstd.to(wide)
            grad_weight = by_row.sum_to_size(factor.shape).reshape(weight.shape).to(weight.dtype)
        grad, factor = grad * (factor.to(wide) + offset), None
    grad_x, shared = norm_gradients(
        grad, grad_rstd, rows, factor, rstd, offset, output_mask=output_mask
    )
    grad_weight = shared if grad_weight is None else grad_weight
    return None if grad_x is None else joined(grad_x, groups), grad_weight


def gated_rms_norm_backward_reference(
    grad_y: torch.Tensor,
    x: torch.Tensor,
    gate: torch.Tensor,
    weight: torch.Tensor | None,
    rstd: torch.Tensor,
    offset: float,
    groups: int,
    gate_first: bool,
    activation: str,
    plan: str,
    output_mask: Sequence[bool],
) -> tuple[Gradient, Gradient, Gradient]:
    """The meaning: grad_y, x, gate (..., N) -> three gradients; rstd (..., 1) or (..., groups, 1).

    `weight` is None, (N,), or (N / groups,) and the same for all groups. The gradients have the
    types of x, gate and weight; one that is not in the mask is None.
    """
    norm = (x, gate, weight, rstd, offset, groups, gate_first, activation)
    grad_x, grad_gate, grad_weight = gated_gradients(grad_y, None, *norm, output_mask)
    return (
        None if grad_x is None else laid_out(grad_x, x, x.dtype),
        None if grad_gate is None else laid_out(grad_gate, gate, gate.dtype),
        grad_weight,
    )


def gated_rms_norm_backward_fake(
    grad_y: torch.Tensor,
    x: torch.Tensor,
    gate: torch.Tensor,
    weight: torch.Tensor | None,
    *arguments: Any,
) -> tuple[Gradient, Gradient, Gradient]:
    output_mask = arguments[-1]
    return (
        empty_gradient(output_mask[0], x, x.dtype),
        empty_gradient(output_mask[1], gate, gate.dtype),
        empty_weight_gradient(output_mask[2], weight),
    )


def _cuda(
    grad_y: torch.Tensor,
    x: torch.Tensor,
    gate: torch.Tensor,
    weight: torch.Tensor | None,
    rstd: torch.Tensor,
    *arguments: Any,
) -> Any:
    from normfuse.ops.kernels.gated_rms_norm_backward import launch

    offset, groups, gate_first, activation, plan, output_mask = arguments
    norm = weight, rstd, offset, groups, gate_first, activation, RoundingPlan.parse(plan)
    return launch(grad_y, x, gate, *norm, output_mask)


GATED_RMS_NORM_BACKWARD = register_gradient(
    SCHEMA,
    reference=gated_rms_norm_backward_reference,
    fake=gated_rms_norm_backward_fake,
    cuda=_cuda,
)
