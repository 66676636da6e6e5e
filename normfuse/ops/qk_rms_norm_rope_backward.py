"""Gradients of norms that stand side by side, turned or not: queries and keys in one launch.

Each gradient turns back by the negative angle, and then goes through its norm as in
`rms_norm_backward`. A rotation "none" leaves it as it is, so that the op serves `qk_rms_norm`, too.
Where heads are short, a kernel holds them whole and takes their rstd anew: none is kept for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from normfuse.ops.one_launch import obstacle_to_one_launch
from normfuse.ops.registration import register_gradient
from normfuse.ops.rms_norm_backward import (
    accumulation_dtype,
    empty_gradient,
    empty_weight_gradient,
    laid_out,
    norm_gradients,
)
from normfuse.ops.rms_norms import weight_of_each
from normfuse.ops.rotation import Rotation, rotated_backward
from normfuse.ops.rounding import L2, RoundingPlan

SCHEMA = (
    "qk_rms_norm_rope_backward(Tensor[] xs, Tensor[] grads, Tensor[] weights, Tensor[] rstds,"
    " Tensor? cos, Tensor? sin, float[] eps, float[] offsets, str[] plans, str[] rotations,"
    " bool[] output_mask) -> Tensor[]"
)

HELD_WIDTH = 1024  # of rows that a program of the kernel holds; it says so, too, as MAX_WIDTH


def qk_rms_norm_rope_backward_reference(
    xs: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor],
    rstds: Sequence[torch.Tensor],
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    eps: Sequence[float],
    offsets: Sequence[float],
    plans: Sequence[str],
    rotations: Sequence[str],
    output_mask: Sequence[bool],
) -> list[torch.Tensor]:
    """The meaning: n tensors (..., N_i) and gradients like them -> the gradients in the mask.

    `rstds` are the n of the forward, or none: then they are computed anew. The mask has an entry
    for every x, then one for every weight; what is not in it is left out of the result.
    """
    wants_x, wants_weight = split_mask(output_mask, plans)
    grad_xs, grad_weights = [], []
    for x, grad, weight, rstd, offset, plan, rotation, *mask in zip(
        xs, grads, weight_of_each(weights, plans), inverse_roots(xs, rstds, eps, plans),
        offsets, plans, rotations, wants_x, wants_weight, strict=True,
    ):  # fmt: skip
        turn = Rotation.parse(rotation)
        if turn is not None:
            assert cos is not None
            assert sin is not None
            grad = rotated_backward(grad.to(accumulation_dtype(rstd.dtype)), cos, sin, turn)
        mean = RoundingPlan.parse(plan).mean
        grad_x, grad_weight = norm_gradients(
            grad, None, x, weight, rstd, offset, mean=mean, output_mask=mask
        )
        grad_xs.append(None if grad_x is None else laid_out(grad_x, x, x.dtype))
        grad_weights.append(grad_weight)
    return present(grad_xs, grad_weights)


def kept_rstds(
    xs: Sequence[torch.Tensor], rstds: Sequence[torch.Tensor], plans: Sequence[str]
) -> list[torch.Tensor]:
    """What a forward keeps for the gradients: the n rstds, or none if they are computed anew.

    A statistic of 16 bits is kept: computed anew it would not have the rounding of the forward.
    """
    widths = [x.shape[-1] for x in xs]
    is_held = all(isinstance(width, int) and width <= HELD_WIDTH for width in widths)
    is_wide = all(RoundingPlan.parse(plan).compute.itemsize >= 4 for plan in plans)
    return [] if is_held and is_wide else list(rstds)


def inverse_roots(
    xs: Sequence[torch.Tensor],
    rstds: Sequence[torch.Tensor],
    eps: Sequence[float],
    plans: Sequence[str],
) -> list[torch.Tensor]:
    """The rstd (..., 1) of every x: those that were kept, or computed anew if none were."""
    if rstds:
        return list(rstds)
    parsed = [RoundingPlan.parse(plan) for plan in plans]
    return [_inverse_root(*norm) for norm in zip(xs, eps, parsed, strict=True)]


def _inverse_root(x: torch.Tensor, eps: float, plan: RoundingPlan) -> torch.Tensor:
    wide = accumulation_dtype(torch.promote_types(x.dtype, plan.compute))
    squares = x.to(wide).square()
    total = squares.sum(-1, keepdim=True)
    return torch.rsqrt((total if plan.mean == L2 else total / x.shape[-1]) + eps)


def split_mask(output_mask: Sequence[bool], plans: Sequence[str]) -> tuple[list[bool], list[bool]]:
    """For each x whether its gradient is wanted, and whether that of its weight is."""
    remaining = iter(output_mask[len(plans) :])
    wants_weight = [
        RoundingPlan.parse(plan).weight is not None and next(remaining) for plan in plans
    ]
    return list(output_mask[: len(plans)]), wants_weight


def present(*results: Sequence[torch.Tensor | None]) -> list[torch.Tensor]:
    """What is not None, in order."""
    return [result for group in results for result in group if result is not None]


def qk_rms_norm_rope_backward_fake(
    xs: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor],
    *arguments: Any,
) -> list[torch.Tensor]:
    plans, _, output_mask = arguments[-3:]
    wants_x, wants_weight = split_mask(output_mask, plans)
    each = weight_of_each(weights, plans)
    return present(
        [empty_gradient(wanted, x, x.dtype) for wanted, x in zip(wants_x, xs, strict=True)],
        [empty_weight_gradient(*pair) for pair in zip(wants_weight, each, strict=True)],
    )


def _cuda(*arguments: Any) -> Any:
    if obstacle_to_one_launch(arguments[0]) is not None:
        return qk_rms_norm_rope_backward_reference(*arguments)
    from normfuse.ops.kernels.qk_rms_norm_rope_backward import launch

    return launch(*for_launch(arguments))


def for_launch(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """The op's arguments as the kernel's launcher takes them: one entry for each x everywhere."""
    xs, grads, weights, rstds, cos, sin, eps, offsets, plans, rotations, output_mask = arguments
    wants_x, wants_weight = split_mask(output_mask, plans)
    each = weight_of_each(weights, plans)
    steps = [RoundingPlan.parse(plan) for plan in plans]
    turns = [Rotation.parse(rotation) for rotation in rotations]
    kept = list(rstds) or [None] * len(xs)
    norms = eps, offsets, steps, turns
    return xs, grads, each, kept, cos, sin, *norms, wants_x, wants_weight


QK_RMS_NORM_ROPE_BACKWARD = register_gradient(
    SCHEMA,
    reference=qk_rms_norm_rope_backward_reference,
    fake=qk_rms_norm_rope_backward_fake,
    cuda=_cuda,
)
