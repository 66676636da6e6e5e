"""Gradients of two normalised branches, added to the residual, and of the norm of that sum.

With norm' as in `rms_norm_backward`:

    grad = norm_4'(grad_y; total) + grad_total

and from there as in `dual_rms_norm_add_backward`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from normfuse.ops.dual_rms_norm_add_backward import (
    branch_gradients,
    for_launch_of_dual,
    norms_of,
)
from normfuse.ops.registration import register_gradient
from normfuse.ops.residual_sum import SCALE_SCHEMA, Scales
from normfuse.ops.rms_norm_backward import (
    Gradient,
    empty_gradient,
    empty_weight_gradient,
    laid_out,
    norm_gradients,
)
from normfuse.ops.rms_norms import weight_of_each

SCHEMA = (
    "dual_rms_norm_add_rms_norm_backward(Tensor grad_y, Tensor? grad_total, Tensor x_1, Tensor x_2,"
    f" Tensor total, Tensor[] weights, Tensor[] rstds, {SCALE_SCHEMA}, float[] offsets,"
    " str[] plans, ScalarType residual_dtype, bool[7] output_mask) -> (Tensor grad_x_1,"
    " Tensor grad_x_2, Tensor grad_residual, Tensor grad_weight_1, Tensor grad_weight_2,"
    " Tensor grad_weight_3, Tensor grad_weight_4)"
)


def dual_rms_norm_add_rms_norm_backward_reference(
    grad_y: torch.Tensor,
    grad_total: torch.Tensor | None,
    x_1: torch.Tensor,
    x_2: torch.Tensor,
    total: torch.Tensor,
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
    """The meaning: grad_y, grad_total, x_1, x_2, total (..., N), four rstd (..., 1) -> seven.

    `weights` holds one (N,) for each plan that has a weight.
    """
    norms = norms_of(weights, rstds, offsets, plans)
    weight_4, rstd_4, offset_4, _ = norms[3]
    mask_4 = (any(output_mask[:6]), output_mask[6])
    grad, grad_weight_4 = norm_gradients(
        grad_y, None, total, weight_4, rstd_4, offset_4, output_mask=mask_4
    )
    if grad is None:
        return (None,) * 6 + (grad_weight_4,)
    if grad_total is not None:
        grad = grad + grad_total
    scales = Scales(branch_scale_tensor, total_scale_tensor, branch_scale, total_scale)
    *grad_xs, grad_residual, grad_1, grad_2, grad_3 = branch_gradients(
        grad, x_1, x_2, norms, scales, output_mask
    )
    grad_residual = laid_out(grad_residual, total, residual_dtype) if output_mask[2] else None
    return *grad_xs, grad_residual, grad_1, grad_2, grad_3, grad_weight_4


def dual_rms_norm_add_rms_norm_backward_fake(
    grad_y: torch.Tensor,
    grad_total: torch.Tensor | None,
    x_1: torch.Tensor,
    x_2: torch.Tensor,
    total: torch.Tensor,
    weights: Sequence[torch.Tensor],
    *arguments: Any,
) -> tuple[Gradient, ...]:
    plans, residual_dtype, output_mask = arguments[-3:]
    return (
        empty_gradient(output_mask[0], x_1, x_1.dtype),
        empty_gradient(output_mask[1], x_2, x_2.dtype),
        empty_gradient(output_mask[2], total, residual_dtype),
        *map(empty_weight_gradient, output_mask[3:], weight_of_each(weights, plans)),
    )


def _cuda(*arguments: Any) -> Any:
    from normfuse.ops.kernels.dual_rms_norm_add_rms_norm_backward import launch

    return tuple(launch(*for_launch_of_dual(arguments)))


DUAL_RMS_NORM_ADD_RMS_NORM_BACKWARD = register_gradient(
    SCHEMA,
    reference=dual_rms_norm_add_rms_norm_backward_reference,
    fake=dual_rms_norm_add_rms_norm_backward_fake,
    cuda=_cuda,
)
