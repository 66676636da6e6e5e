"""Several RMSNorms of one value: y_i = x / sqrt(mean(x^2) + eps) * (weight_i + offset_i) * scale_i.

Gemma 4's experts: the residual is normalised for the dense branch, for the experts and for the
router, whose norm a number scales afterwards. One statistic and one read of x serve them all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from normfuse.ops.registration import needs_plain_torch, register
from normfuse.ops.rms_norm import (
    check_plan,
    rms_norm_fake,
    rms_norm_reference,
)
from normfuse.ops.rms_norm_backward import norm_gradients
from normfuse.ops.rms_norms_backward import RMS_NORMS_BACKWARD
from normfuse.ops.rounding import RoundingPlan
from normfuse.ops.validation import check_activation, check_eps, check_weight

SCHEMA = (
    "rms_norms(Tensor x, Tensor[] weights, float eps, float[] offsets, float[] scales,"
    " str[] plans) -> Tensor[]"
)
MAX_NORMS = 4


def rms_norms_reference(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    eps: float,
    offsets: Sequence[float],
    scales: Sequence[float],
    plans: Sequence[str],
) -> list[torch.Tensor]:
    """The meaning: x (..., N) -> y_1, ..., y_n (..., N), each in its `plan.out`, rstd (..., 1).

    `weights` holds one (N,) for each plan that has a weight. A scale multiplies the rounded result,
    and the product is rounded again; 1.0 is none.
    """
    ys = []
    for weight, offset, scale, plan in zip(
        weight_of_each(weights, plans), offsets, scales, plans, strict=True
    ):
        y, rstd = rms_norm_reference(x, weight, None, eps, offset, plan)
        ys.append(y if scale == 1.0 else y * scale)
    return [*ys, rstd]


def weight_of_each(
    weights: Sequence[torch.Tensor], plans: Sequence[str]
) -> list[torch.Tensor | None]:
    """The weight of every plan, None for a weightless one."""
    remaining = iter(weights)
    return [None if RoundingPlan.parse(plan).weight is None else next(remaining) for plan in plans]


def rms_norms_fake(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    eps: float,
    offsets: Sequence[float],
    scales: Sequence[float],
    plans: Sequence[str],
) -> list[torch.Tensor]:
    results = [rms_norm_fake(x, None, None, eps, 0.0, plan) for plan in plans]
    return [*(y for y, _ in results), results[0][1]]


def _cuda(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    eps: float,
    offsets: Sequence[float],
    scales: Sequence[float],
    plans: Sequence[str],
) -> Any:
    from normfuse.ops.kernels.rms_norms import launch

    steps = [RoundingPlan.parse(plan) for plan in plans]
    return launch(x, weight_of_each(weights, plans), eps, offsets, scales, steps)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[torch.Tensor]) -> None:
    x, weights, _, offsets, scales, plans = inputs
    ctx.save_for_backward(x, output[-1], *weights)
    ctx.norms = (offsets, scales, plans)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grads: list[torch.Tensor | None]) -> Any:
    """By one op for all results that have a gradient, unless they need more than it has."""
    if grads[-1] is not None or needs_plain_torch():
        return _plain_gradients(ctx, grads)
    x, rstd, *weights = ctx.saved_tensors
    wants_x, wants_weights = ctx.needs_input_grad[:2]
    owners = [index for index, plan in enumerate(ctx.norms[2]) if RoundingPlan.parse(plan).weight]
    live = [index for index, grad in enumerate(grads[:-1]) if grad is not None]
    live_weights = [i for i, owner in enumerate(owners) if owner in live]
    mask = [wants_x, *(wants_weights[i] for i in live_weights)]
    grad_x, grad_weights = None, [None] * len(weights)
    if live and any(mask):
        operands = (x, [grads[i] for i in live], [weights[i] for i in live_weights], rstd)
        norms = ([numbers[i] for i in live] for numbers in ctx.norms)
        found = iter(RMS_NORMS_BACKWARD(*operands, *norms, mask))
        grad_x = next(found) if wants_x else None
        for index in live_weights:
            grad_weights[index] = next(found) if wants_weights[index] else None
    return grad_x, grad_weights, None, None, None, None


def _plain_gradients(ctx: Any, grads: list[torch.Tensor | None]) -> Any:
    """The gradients of x add up, because every norm reads it."""
    x, rstd, *weights = ctx.saved_tensors
    *grad_ys, grad_rstd = grads
    offsets, scales, plans = ctx.norms
    mean = RoundingPlan.parse(plans[0]).mean
    grad_x, _ = norm_gradients(None, grad_rstd, x, None, rstd, 0.0, mean=mean)
    grad_weights = []
    for weight, grad_y, offset, scale in zip(
        weight_of_each(weights, plans), grad_ys, offsets, scales, strict=True
    ):
        scaled = None if grad_y is None else grad_y.to(rstd.dtype) * scale
        grad, grad_weight = norm_gradients(scaled, None, x, weight, rstd, offset, mean=mean)
        grad_x = grad_x + grad
        if weight is not None:
            grad_weights.append(grad_weight)
    return grad_x.to(x.dtype), grad_weights, None, None, None, None


RMS_NORMS = register(
    SCHEMA,
    reference=rms_norms_reference,
    fake=rms_norms_fake,
    cuda=_cuda,
    setup_context=_setup_context,
    backward=_backward,
)


def rms_norms(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor | None],
    eps: float = 1e-6,
    *,
    offsets: Sequence[float] | None = None,
    scales: Sequence[float] | None = None,
    plans: Sequence[RoundingPlan] | None = None,
) -> tuple[torch.Tensor, ...]:
    """Several RMSNorms of x over the last axis, with one statistic.

    Args:
        x: (..., N), float16, bfloat16, float32 or float64; rows of any stride.
        weights: two to four of (N,), any of these types, or None for a weightless norm.
        eps: added to the mean of the squares.
        offsets: added to each weight; by default 0.0.
        scales: numbers that multiply each rounded result; by default 1.0, which is none.
        plans: where each norm rounds; by default once, at its end. Their statistics must be the
            same.

    Returns:
        One (..., N) in `plan.out` for each weight.

    Raises:
        TypeError, ValueError: a type, shape, device or number of norms does not fit.
    """
    check_activation("x", x)
    check_eps("eps", eps)
    _check_count(weights)
    for index, weight in enumerate(weights):
        check_weight(f"weights[{index}]", weight, x)
    if plans is None:
        plans = [RoundingPlan.once(x.dtype, None if w is None else w.dtype) for w in weights]
    offsets = [0.0] * len(weights) if offsets is None else offsets
    scales = [1.0] * len(weights) if scales is None else scales
    for name, values in (("offsets", offsets), ("scales", scales), ("plans", plans)):
        _check_one_each(name, values, weights)
    for index, (plan, weight) in enumerate(zip(plans, weights, strict=True)):
        check_plan(f"plans[{index}]", plan, weight)
        _check_statistic(index, plan, plans[0])
    present = [weight for weight in weights if weight is not None]
    steps = [str(plan) for plan in plans]
    *ys, _ = RMS_NORMS(x, present, eps, list(offsets), list(scales), steps)
    return tuple(ys)


def _check_count(weights: Sequence[torch.Tensor | None]) -> None:
    if not 2 <= len(weights) <= MAX_NORMS:
        raise ValueError(
            f"weights must be those of 2 to {MAX_NORMS} norms, got {len(weights)}: "
            "call rms_norm for one, and rms_norms again for more"
        )


def _check_one_each(
    name: str, values: Sequence[object], weights: Sequence[torch.Tensor | None]
) -> None:
    if len(values) != len(weights):
        raise ValueError(
            f"{name} must have one entry for each of the {len(weights)} weights, "
            f"got {len(values)}: pass one for every norm"
        )


def _check_statistic(index: int, plan: RoundingPlan, first: RoundingPlan) -> None:
    if plan.statistic != first.statistic:
        raise ValueError(
            f"plans[{index}] must have the statistic of plans[0], '{first}', got '{plan}': "
            "norms with another compute type, mean or root need a call of their own"
        )
