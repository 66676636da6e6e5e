"""Norms that stand side by side: the queries, keys and perhaps values of one attention.

y_i = x_i / sqrt(mean(x_i^2) + eps_i) * (weight_i + offset_i), each over its own last axis. Qwen 3
and Gemma 3 normalise each head of q and k, OLMo 2 whole projections, Gemma 4 also v, without a
weight; Jamba normalises three slices of one projection.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from normfuse.ops.joint import (
    apart,
    empty_statistic,
    heads_axis,
    joined,
    laid_out_as,
    num_joint,
    obstacle_to_joint_norms,
)
from normfuse.ops.one_launch import obstacle_to_one_launch
from normfuse.ops.qk_rms_norm_rope_backward import (
    QK_RMS_NORM_ROPE_BACKWARD,
    inverse_roots,
    kept_rstds,
)
from normfuse.ops.registration import needs_plain_torch, register
from normfuse.ops.rms_norm import (
    check_plan,
    rms_norm_fake,
    rms_norm_reference,
)
from normfuse.ops.rms_norm_backward import norm_gradients
from normfuse.ops.rms_norms import weight_of_each
from normfuse.ops.rounding import RoundingPlan
from normfuse.ops.validation import check_activation, check_eps, check_weight_of_heads

SCHEMA = (
    "qk_rms_norm(Tensor[] xs, Tensor[] weights, float[] eps, float[] offsets, str[] plans)"
    " -> Tensor[]"
)

Gradients = Sequence[torch.Tensor | None]


class QKRMSNorm(NamedTuple):
    """Results of `qk_rms_norm`: the normalised q and k, and v where one was given."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor | None


def qk_rms_norm_reference(
    xs: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor],
    eps: Sequence[float],
    offsets: Sequence[float],
    plans: Sequence[str],
) -> list[torch.Tensor]:
    """The meaning: n tensors (..., N_i) -> their norms, and then their n rstd (..., 1).

    `weights` holds one for each plan that has a weight: (N_i,), or (H, 1, ..., N_i) for a norm over
    the axis of that many heads, too, along which its rstd has one element.
    """
    slots = zip(xs, weight_of_each(weights, plans), eps, offsets, plans, strict=True)
    norms = [norm_reference(*slot) for slot in slots]
    return [y for y, _ in norms] + [rstd for _, rstd in norms]


def norm_reference(
    x: torch.Tensor, weight: torch.Tensor | None, eps: float, offset: float, plan: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """One of them: x (..., N) -> its norm and its rstd."""
    axis = heads_axis(weight)
    if axis is None or weight is None:
        return rms_norm_reference(x, weight, None, eps, offset, plan)
    rows, vector = joined(x, axis), weight.flatten()
    y, rstd = rms_norm_reference(rows, vector, None, eps, offset, plan)
    return laid_out_as(y, axis, x), apart(rstd, axis, 1)


def qk_rms_norm_fake(
    xs: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor],
    eps: Sequence[float],
    offsets: Sequence[float],
    plans: Sequence[str],
) -> list[torch.Tensor]:
    slots = zip(xs, weight_of_each(weights, plans), eps, offsets, plans, strict=True)
    norms = [_norm_fake(*slot) for slot in slots]
    return [y for y, _ in norms] + [rstd for _, rstd in norms]


def _norm_fake(
    x: torch.Tensor, weight: torch.Tensor | None, eps: float, offset: float, plan: str
) -> tuple[torch.Tensor, torch.Tensor]:
    axis = heads_axis(weight)
    if axis is None:
        return rms_norm_fake(x, weight, None, eps, offset, plan)
    steps = RoundingPlan.parse(plan)
    rstd = empty_statistic(x, axis, steps.compute)
    return torch.empty_like(x, dtype=steps.out), rstd


def _cuda(
    xs: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor],
    eps: Sequence[float],
    offsets: Sequence[float],
    plans: Sequence[str],
) -> Any:
    each = weight_of_each(weights, plans)
    if (obstacle_to_one_launch(xs) or obstacle_to_joint_norms(xs, each)) is not None:
        return qk_rms_norm_reference(xs, weights, eps, offsets, plans)
    from normfuse.ops.kernels.qk_rms_norm import launch

    return launch(xs, each, eps, offsets, [RoundingPlan.parse(plan) for plan in plans])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Sequence[torch.Tensor]) -> None:
    xs, weights, eps, offsets, plans = inputs
    ctx.save_for_backward(*xs, *weights, *kept_rstds(xs, output[len(xs) :], plans))
    ctx.eps, ctx.offsets, ctx.plans = eps, offsets, plans
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grads: Gradients) -> Any:
    num = len(ctx.plans)
    norms = (*split_saved(ctx.saved_tensors, ctx.plans), ctx.eps, ctx.offsets, ctx.plans)
    is_joint = any(map(heads_axis, norms[1]))
    if is_joint or needs_plain_torch() or any(grad is not None for grad in grads[num:]):
        return *norms_backward(grads[:num], grads[num:], *norms), None, None, None
    mask = ctx.needs_input_grad[:2]
    return *norms_gradients(grads[:num], *norms, None, None, ["none"] * num, mask), *(None,) * 3


def norms_gradients(
    grads: Gradients,
    xs: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor],
    rstds: Sequence[torch.Tensor],
    eps: Sequence[float],
    offsets: Sequence[float],
    plans: Sequence[str],
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    rotations: Sequence[str],
    wanted: Sequence[Sequence[bool]],
) -> tuple[list[torch.Tensor | None], list[torch.Tensor | None]]:
    """The gradients of xs and weights, by one op for all results that have one."""
    owners = [index for index, plan in enumerate(plans) if RoundingPlan.parse(plan).weight]
    live = [index for index, grad in enumerate(grads) if grad is not None]
    live_weights = [i for i, owner in enumerate(owners) if owner in live]
    mask = [wanted[0][i] for i in live] + [wanted[1][i] for i in live_weights]
    grad_xs: list[torch.Tensor | None] = [None] * len(xs)
    grad_weights: list[torch.Tensor | None] = [None] * len(weights)
    if not any(mask):
        return grad_xs, grad_weights
    found = iter(
        QK_RMS_NORM_ROPE_BACKWARD(
            [xs[i] for i in live],
            [grads[i] for i in live],
            [weights[i] for i in live_weights],
            [rstds[i] for i in live] if rstds else [],
            cos,
            sin,
            [eps[i] for i in live],
            [offsets[i] for i in live],
            [plans[i] for i in live],
            [rotations[i] for i in live],
            mask,
        )
    )
    for index in live:
        grad_xs[index] = next(found) if wanted[0][index] else None
    for index in live_weights:
        grad_weights[index] = next(found) if wanted[1][index] else None
    return grad_xs, grad_weights


def split_saved(saved: Sequence[Any], plans: Sequence[str]) -> tuple[Any, Any, Any]:
    """What a context saved: n tensors, their weights, n rstd or none."""
    num = len(plans)
    end = num + sum(RoundingPlan.parse(plan).weight is not None for plan in plans)
    return saved[:num], saved[num:end], saved[end:]


def norms_backward(
    grad_ys: Gradients,
    grad_rstds: Gradients,
    xs: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor],
    rstds: Sequence[torch.Tensor],
    eps: Sequence[float],
    offsets: Sequence[float],
    plans: Sequence[str],
) -> tuple[list[torch.Tensor], list[torch.Tensor | None]]:
    """The gradients of every x, and of the weights that there are."""
    each = weight_of_each(weights, plans)
    axes = [heads_axis(weight) for weight in each]
    grad_ys, grad_rstds, rows = (_all_joined(all_, axes) for all_ in (grad_ys, grad_rstds, xs))
    rstds = inverse_roots(rows, _all_joined(rstds, axes), eps, plans)
    grad_xs, grad_weights = [], []
    for grad_y, grad_rstd, x, weight, rstd, offset, axis in zip(
        grad_ys, grad_rstds, rows, each, rstds, offsets, axes, strict=True
    ):
        vector = weight.flatten() if weight is not None else None
        grad_x, grad_weight = norm_gradients(grad_y, grad_rstd, x, vector, rstd, offset)
        grad_x = grad_x.to(x.dtype)
        if axis is not None:
            grad_x = apart(grad_x, axis, num_joint(weight))
        grad_xs.append(grad_x)
        if weight is not None:
            grad_weights.append(None if grad_weight is None else grad_weight.view(weight.shape))
    return grad_xs, grad_weights


def _all_joined(tensors: Gradients, axes: Sequence[int | None]) -> list[Any]:
    """Tensors of heads as the norms see them: those of joint ones with all heads in a row."""
    pairs = zip(tensors, axes, strict=False)
    return [one if one is None or axis is None else joined(one, axis) for one, axis in pairs]


QK_RMS_NORM = register(
    SCHEMA,
    reference=qk_rms_norm_reference,
    fake=qk_rms_norm_fake,
    cuda=_cuda,
    setup_context=_setup_context,
    backward=_backward,
)


class Norms(NamedTuple):
    """The norms of one call, checked: one entry of each for q, k and perhaps v."""

    xs: list[torch.Tensor]
    weights: list[torch.Tensor]
    eps: list[float]
    offsets: list[float]
    plans: list[str]


def checked_norms(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor | None,
    weight_q: torch.Tensor | None,
    weight_k: torch.Tensor | None,
    eps: float,
    offset: float,
    plans: tuple[RoundingPlan | None, RoundingPlan | None],
) -> Norms:
    """What both public functions take, as the ops want it.

    Raises:
        TypeError, ValueError: a type, shape or device does not fit.
    """
    check_eps("eps", eps)
    norms = Norms([], [], [], [], [])
    slots = [("q", q, weight_q, plans[0]), ("k", k, weight_k, plans[1])]
    if v is not None:
        slots.append(("v", v, None, None))
    for name, x, weight, plan in slots:
        check_activation(name, x)
        check_weight_of_heads(f"weight_{name}", weight, x)
        steps = plan or RoundingPlan.once(x.dtype, None if weight is None else weight.dtype)
        check_plan(f"plan_{name}", steps, weight)
        norms.xs.append(x)
        norms.weights.extend([] if weight is None else [weight])
        norms.eps.append(eps)
        norms.offsets.append(0.0 if weight is None else offset)
        norms.plans.append(str(steps))
    return norms


def qk_rms_norm(
    q: torch.Tensor,
    k: torch.Tensor,
    weight_q: torch.Tensor | None = None,
    weight_k: torch.Tensor | None = None,
    eps: float = 1e-6,
    *,
    v: torch.Tensor | None = None,
    offset: float = 0.0,
    plan_q: RoundingPlan | None = None,
    plan_k: RoundingPlan | None = None,
) -> QKRMSNorm:
    """RMSNorm of q and k, and weightless of v if given, over their last axes, in one launch.

    Args:
        q: (..., N), float16, bfloat16, float32 or float64; rows of any stride.
        k: (..., M), any of these types.
        weight_q: (N,), or None, or (H, 1, ..., N): then q is (..., H, ..., N), and each norm runs
            over all H heads of a token.
        weight_k: (M,), or None, or that of all heads of k.
        eps: added to the mean of the squares.
        v: (..., L) or None; normalised without a weight.
        offset: added to the weights; 1.0 for Gemma 3.
        plan_q: where the norm of q rounds; by default once, at its end.
        plan_k: where the norm of k rounds; by default once, at its end.

    Returns:
        `QKRMSNorm(q, k, v)`, each with the shape of its input and the type of its plan's `out`.

    Raises:
        TypeError, ValueError: a type, shape or device does not fit.
    """
    norms = checked_norms(q, k, v, weight_q, weight_k, eps, offset, (plan_q, plan_k))
    results = QK_RMS_NORM(*norms)
    return QKRMSNorm(results[0], results[1], None if v is None else results[2])
