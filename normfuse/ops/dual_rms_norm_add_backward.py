"""Gradients of two normalised branches, their normalised sum, and the residual add.

With norm' as in `rms_norm_backward`, and branch = norm_1(x_1) + norm_2(x_2) formed again:

    grad_residual = grad_total * total_scale
    grad_branch   = norm_3'(grad_residual * branch_scale; branch)
    grad_x_i      = norm_i'(grad_branch; x_i)                        for 1 and 2

The branch is rounded where eager rounded it, because its inverse root was made of that.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from normfuse.ops.registration import register_gradient
from normfuse.ops.residual_sum import SCALE_SCHEMA, Scales, scaled
from normfuse.ops.rms_norm import normalised_by
from normfuse.ops.rms_norm_backward import (
    Gradient,
    accumulation_dtype,
    empty_gradient,
    empty_weight_gradient,
    laid_out,
    norm_gradients,
)
from normfuse.ops.rms_norms import weight_of_each
from normfuse.ops.rounding import RoundingPlan

SCHEMA = (
    "dual_rms_norm_add_backward(Tensor grad_total, Tensor x_1, Tensor x_2, Tensor[] weights,"
    f" Tensor[] rstds, {SCALE_SCHEMA}, float[] offsets, str[] plans, ScalarType residual_dtype,"
    " bool[6] output_mask) -> (Tensor grad_x_1, Tensor grad_x_2, Tensor grad_residual,"
    " Tensor grad_weight_1, Tensor grad_weight_2, Tensor grad_weight_3)"
)

Norm = tuple[torch.Tensor | None, torch.Tensor, float, str]


def dual_rms_norm_add_backward_reference(
    grad_total: torch.Tensor,
    x_1: torch.Tensor,
    x_2: torch.Tensor,
    weights: Sequence[torch.Tensor],
    rstds: Sequence[torch.Tensor],
    branch_scale_tensor: torch.Tensor | None,
    total_scale_tensor: torch.Tensor | None,
    branch_scale: float | None,
    total_scale: float | None,
    offsets: Sequence[float],
    plans: Sequence[str],
    residual_dtype: torch.dtype,
    output_mask: Sequence[bool],
) -> tuple[Gradient, ...]:
    """The meaning: grad_total, x_1, x_2 (..., N), three rstd (..., 1) -> six gradients.

    `weights` holds one (N,) for each plan that has a weight. Without a total scale, the gradient of
    a residual of the sum's type is `grad_total` itself: do not ask for it.
    """
    grad = grad_total.to(accumulation_dtype(rstds[2].dtype))
    scales = Scales(branch_scale_tensor, total_scale_tensor, branch_scale, total_scale)
    norms = norms_of(weights, rstds, offsets, plans)
    *grad_xs, grad_residual, grad_1, grad_2, grad_3 = branch_gradients(
        grad, x_1, x_2, norms, scales, output_mask
    )
    grad_residual = laid_out(grad_residual, x_1, residual_dtype) if output_mask[2] else None
    return *grad_xs, grad_residual, grad_1, grad_2, grad_3


def norms_of(
    weights: Sequence[torch.Tensor],
    rstds: Sequence[torch.Tensor],
    offsets: Sequence[float],
    plans: Sequence[str],
) -> list[Norm]:
    """(weight, rstd, offset, plan) of each norm; a weightless one has None."""
    return list(zip(weight_of_each(weights, plans), rstds, offsets, plans, strict=True))


def branch_gradients(
    grad: torch.Tensor,
    x_1: torch.Tensor,
    x_2: torch.Tensor,
    norms: Sequence[Norm],
    scales: Scales,
    output_mask: Sequence[bool],
) -> tuple[Any, ...]:
    """The six gradients for that of the sum, `grad`, wide; that of the residual is wide, too."""
    norm_1, norm_2, (weight_3, rstd_3, offset_3, _) = norms[:3]
    grad_residual = scaled(grad, scales.total, scales.total_tensor)
    grad_normed = scaled(grad_residual, scales.branch, scales.branch_tensor)
    wants_1, wants_2 = (output_mask[0], output_mask[3]), (output_mask[1], output_mask[4])
    mask_3 = (any(wants_1 + wants_2), output_mask[5])
    if not any(mask_3):
        return None, None, grad_residual, None, None, None
    branch = normalised_by(x_1, *norm_1) + normalised_by(x_2, *norm_2)
    grad_branch, grad_weight_3 = norm_gradients(
        grad_normed, None, branch, weight_3, rstd_3, offset_3, output_mask=mask_3
    )
    grad_x_1, grad_weight_1 = _norm_gradients(grad_branch, x_1, norm_1, wants_1)
    grad_x_2, grad_weight_2 = _norm_gradients(grad_branch, x_2, norm_2, wants_2)
    return grad_x_1, grad_x_2, grad_residual, grad_weight_1, grad_weight_2, grad_weight_3


def _norm_gradients(
    grad: Gradient, x: torch.Tensor, norm: Norm, wanted: tuple[bool, bool]
) -> tuple[Gradient, Gradient]:
    weight, rstd, offset, _ = norm
    grad_x, grad_weight = norm_gradients(grad, None, x, weight, rstd, offset, output_mask=wanted)
    return None if grad_x is None else laid_out(grad_x, x, x.dtype), grad_weight


def dual_rms_norm_add_backward_fake(
    grad_total: torch.Tensor,
    x_1: torch.Tensor,
    x_2: torch.Tensor,
    weights: Sequence[torch.Tensor],
    *arguments: Any,
) -> tuple[Gradient, ...]:
    plans, residual_dtype, output_mask = arguments[-3:]
    return (
        empty_gradient(output_mask[0], x_1, x_1.dtype),
        empty_gradient(output_mask[1], x_2, x_2.dtype),
        empty_gradient(output_mask[2], x_1, residual_dtype),
        *map(empty_weight_gradient, output_mask[3:], weight_of_each(weights, plans)),
    )


def _cuda(*arguments: Any) -> Any:
    from normfuse.ops.kernels.dual_rms_norm_add_backward import launch

    return tuple(launch(*for_launch_of_dual(arguments)))


def for_launch_of_dual(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """The op's arguments as the kernel's launcher takes them: no norm of the sum, norms gathered.

    Also those of `dual_rms_norm_add_rms_norm_backward`, which begin with two gradients.
    """
    *operands, weights, rstds, branch_tensor, total_tensor, branch, total = arguments[:-4]
    offsets, plans, residual_dtype, output_mask = arguments[-4:]
    if len(plans) == 3:
        operands = [None, *operands, None]
    norms = [
        (weight, rstd, offset, RoundingPlan.parse(plan))
        for weight, rstd, offset, plan in norms_of(weights, rstds, offsets, plans)
    ]
    scales = Scales(branch_tensor, total_tensor, branch, total)
    return operands, norms, scales, residual_dtype, output_mask


DUAL_RMS_NORM_ADD_BACKWARD = register_gradient(
    SCHEMA,
    reference=dual_rms_norm_add_backward_reference,
    fake=dual_rms_norm_add_backward_fake,
    cuda=_cuda,
)
