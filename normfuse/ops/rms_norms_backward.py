"""Gradients of several RMSNorms of one value, from x and its one saved rstd.

With unit = x * rstd and g = sum over i of grad_y_i * scale_i * (weight_i + offset_i):

    grad_x        = (g - unit / N * sum(g * unit)) * rstd
    grad_weight_i = sum over rows of grad_y_i * scale_i * unit

Every norm reads x, so that their gradients are added before the one reduction over its row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

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
    "rms_norms_backward(Tensor x, Tensor[] grads, Tensor[] weights, Tensor rstd, float[] offsets,"
    " float[] scales, str[] plans, bool[] output_mask) -> Tensor[]"
)


def rms_norms_backward_reference(
    x: torch.Tensor,
    grads: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor],
    rstd: torch.Tensor,
    offsets: Sequence[float],
    scales: Sequence[float],
    plans: Sequence[str],
    output_mask: Sequence[bool],
) -> list[torch.Tensor]:
    """The meaning: x, n gradients (..., N), weights (N,), rstd (..., 1) -> those in the mask.

    `weights` holds one for each plan that has a weight. The mask has an entry for x, then one for
    every weight; what is not in it is left out of the result.
    """
    wide = accumulation_dtype(rstd.dtype)
    total: torch.Tensor | None = None
    grad_weights: list[Gradient] = []
    for grad, (weight, is_wanted), offset, scale in zip(
        grads, each_weight(weights, plans, output_mask), offsets, scales, strict=True
    ):
        g = grad.to(wide) if scale == 1.0 else grad.to(wide) * scale
        mask = (False, is_wanted)
        grad_weights.append(norm_gradients(g, None, x, weight, rstd, offset, output_mask=mask)[1])
        if weight is not None:
            g = g * (weight.to(wide) + offset if offset else weight.to(wide))
        total = g if total is None else total + g
    mean, mask = RoundingPlan.parse(plans[0]).mean, (output_mask[0], False)
    grad_x, _ = norm_gradients(total, None, x, None, rstd, 0.0, mean=mean, output_mask=mask)
    grad_x = None if grad_x is None else laid_out(grad_x, x, x.dtype)
    return [grad for grad in (grad_x, *grad_weights) if grad is not None]


def each_weight(
    weights: Sequence[torch.Tensor], plans: Sequence[str], output_mask: Sequence[bool]
) -> Iterator[tuple[torch.Tensor | None, bool]]:
    """For every plan its weight, None if it has none, and whether that weight learns."""
    remaining = iter(zip(weights, output_mask[1:], strict=True))
    for plan in plans:
        yield next(remaining) if RoundingPlan.parse(plan).weight is not None else (None, False)


def rms_norms_backward_fake(
    x: torch.Tensor,
    grads: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor],
    *arguments: Any,
) -> list[torch.Tensor]:
    wants_x, *wants_weights = arguments[-1]
    fakes = [empty_gradient(wants_x, x, x.dtype)]
    fakes += map(empty_weight_gradient, wants_weights, weights)
    return [fake for fake in fakes if fake is not None]


def _cuda(*arguments: Any) -> Any:
    from normfuse.ops.kernels.rms_norms_backward import launch

    return launch(*for_launch_of_norms(arguments))


def for_launch_of_norms(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """The op's arguments as the kernel's launcher takes them: one entry for each norm."""
    x, grads, weights, rstd, offsets, scales, plans, output_mask = arguments
    each, wants_weights = zip(*each_weight(weights, plans, output_mask), strict=True)
    mask = (output_mask[0], *wants_weights)
    return x, grads, each, rstd, offsets, scales, RoundingPlan.parse(plans[0]), mask


RMS_NORMS_BACKWARD = register_gradient(
    SCHEMA, reference=rms_norms_backward_reference, fake=rms_norms_backward_fake, cuda=_cuda
)
