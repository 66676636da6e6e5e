"""Per-head norms of queries and keys, then rotary embedding: Qwen 3, Gemma 3, GLM 4, EXAONE 4.

y_i = rotated(x_i / sqrt(mean(x_i^2) + eps_i) * (weight_i + offset_i); cos, sin), each head alone.
A value (Gemma 4's, without a weight) may stand beside them and is not turned. A norm may also run
over all heads of a token, each of which turns alone: OLMo 2, MiniMax M2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from normfuse.ops.joint import heads_axis, obstacle_to_joint_norms
from normfuse.ops.one_launch import obstacle_to_one_launch
from normfuse.ops.qk_rms_norm import (
    Gradients,
    QKRMSNorm,
    checked_norms,
    norm_reference,
    norms_backward,
    norms_gradients,
    qk_rms_norm_fake,
    qk_rms_norm_reference,
    split_saved,
)
from normfuse.ops.qk_rms_norm_rope_backward import kept_rstds
from normfuse.ops.registration import needs_plain_torch, register
from normfuse.ops.rms_norm_backward import accumulation_dtype
from normfuse.ops.rms_norms import weight_of_each
from normfuse.ops.rotation import (
    Rotation,
    checked_rotations,
    empty_result,
    rotated,
    rotated_backward,
    table_gradients,
)
from normfuse.ops.rounding import RoundingPlan

SCHEMA = (
    "qk_rms_norm_rope(Tensor[] xs, Tensor[] weights, Tensor cos, Tensor sin,"
    " float[] eps, float[] offsets, str[] plans, str[] rotations) -> Tensor[]"
)


def qk_rms_norm_rope_reference(
    xs: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor],
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: Sequence[float],
    offsets: Sequence[float],
    plans: Sequence[str],
    rotations: Sequence[str],
) -> list[torch.Tensor]:
    """The meaning: n tensors (..., N_i) -> their turned norms, and then their n rstd (..., 1).

    cos and sin broadcast against every x that turns; a rotation "none" leaves its norm as it is.
    """
    results = qk_rms_norm_reference(xs, weights, eps, offsets, plans)
    for index, rotation in enumerate(map(Rotation.parse, rotations)):
        if rotation is not None:
            results[index] = rotated(results[index], cos, sin, rotation)
    return results


def qk_rms_norm_rope_fake(
    xs: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor],
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: Sequence[float],
    offsets: Sequence[float],
    plans: Sequence[str],
    rotations: Sequence[str],
) -> list[torch.Tensor]:
    results = qk_rms_norm_fake(xs, weights, eps, offsets, plans)
    for index, rotation in enumerate(map(Rotation.parse, rotations)):
        if rotation is not None:
            results[index] = empty_result(results[index], rotation)
    return results


def _cuda(
    xs: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor],
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: Sequence[float],
    offsets: Sequence[float],
    plans: Sequence[str],
    rotations: Sequence[str],
) -> Any:
    each = weight_of_each(weights, plans)
    if (obstacle_to_one_launch(xs) or obstacle_to_joint_norms(xs, each, cos)) is not None:
        norms = eps, offsets, plans, rotations
        return qk_rms_norm_rope_reference(xs, weights, cos, sin, *norms)
    from normfuse.ops.kernels.qk_rms_norm_rope import launch

    parsed = [RoundingPlan.parse(plan) for plan in plans]
    turns = [Rotation.parse(rotation) for rotation in rotations]
    return launch(xs, each, cos, sin, eps, offsets, parsed, turns)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Sequence[torch.Tensor]) -> None:
    xs, weights, cos, sin, eps, offsets, plans, rotations = inputs
    ctx.save_for_backward(cos, sin, *xs, *weights, *kept_rstds(xs, output[len(xs) :], plans))
    ctx.eps, ctx.offsets, ctx.plans, ctx.rotations = eps, offsets, plans, rotations
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grads: Gradients) -> Any:
    num = len(ctx.plans)
    tables_learn = any(ctx.needs_input_grad[2:4])
    cos, sin, *saved = ctx.saved_tensors
    is_joint = any(map(heads_axis, split_saved(saved, ctx.plans)[1]))
    is_plain = needs_plain_torch() or tables_learn or is_joint
    if is_plain or any(grad is not None for grad in grads[num:]):
        return _plain_gradients(ctx, grads)
    norms = (*split_saved(saved, ctx.plans), ctx.eps, ctx.offsets, ctx.plans)
    wanted = ctx.needs_input_grad[:2]
    gradients = norms_gradients(grads[:num], *norms, cos, sin, ctx.rotations, wanted)
    return *gradients, *(None,) * 6


def _plain_gradients(ctx: Any, grads: Gradients) -> Any:
    num = len(ctx.plans)
    cos, sin, *saved = ctx.saved_tensors
    xs, weights, rstds = split_saved(saved, ctx.plans)
    grad_ys: list[torch.Tensor | None] = []
    grad_tables = [torch.zeros_like(cos), torch.zeros_like(sin)]
    norms = zip(
        xs, weight_of_each(weights, ctx.plans), ctx.eps, ctx.offsets, ctx.plans, strict=True
    )
    turns = map(Rotation.parse, ctx.rotations)
    for grad, rotation, (x, weight, *norm) in zip(grads, turns, norms, strict=False):
        if grad is None or rotation is None:
            grad_ys.append(grad)
            continue
        compute = RoundingPlan.parse(norm[-1]).compute
        wide = grad.to(accumulation_dtype(torch.promote_types(x.dtype, compute)))
        grad_ys.append(rotated_backward(wide, cos, sin, rotation))
        if any(ctx.needs_input_grad[2:4]):
            y, _ = norm_reference(x, weight, *norm)
            found = table_gradients(wide, y, cos, sin, rotation)
            grad_tables = [a + b for a, b in zip(grad_tables, found, strict=True)]
    grad_xs, grad_weights = norms_backward(
        grad_ys, grads[num:], xs, weights, rstds, ctx.eps, ctx.offsets, ctx.plans
    )
    return grad_xs, grad_weights, *grad_tables, None, None, None, None


QK_RMS_NORM_ROPE = register(
    SCHEMA,
    reference=qk_rms_norm_rope_reference,
    fake=qk_rms_norm_rope_fake,
    cuda=_cuda,
    setup_context=_setup_context,
    backward=_backward,
)


def qk_rms_norm_rope(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    weight_q: torch.Tensor | None = None,
    weight_k: torch.Tensor | None = None,
    eps: float = 1e-6,
    *,
    v: torch.Tensor | None = None,
    layout: str = "half",
    rotary_dim: int | None = None,
    offset: float = 0.0,
    plan_q: RoundingPlan | None = None,
    plan_k: RoundingPlan | None = None,
) -> QKRMSNorm:
    """RMSNorm of every head of q and k, then rotary embedding, in one launch.

    Args:
        q: (..., D), float16, bfloat16, float32 or float64; heads of any stride.
        k: (..., D), any of these types.
        cos: (..., R) or (..., R / 2), broadcasting against q and k; R is `rotary_dim`. R / 2
            columns hold one angle for each pair of columns.
        sin: the shape and type of cos.
        weight_q: (D,), or None, or (H, 1, ..., D): then q is (..., H, ..., D), and each norm runs
            over all H heads of a token, as in OLMo 2.
        weight_k: (D,), or None, or that of all heads of k.
        eps: added to the mean of the squares.
        v: (..., N) or None; normalised without a weight, and not turned.
        layout: `"half"` turns columns j and j + R / 2 together, `"interleaved"` and `"complex"`
            neighbours; "complex" rounds as a product of complex numbers does.
        rotary_dim: how many of the first columns turn; by default all.
        offset: added to the weights; 1.0 for Gemma 3.
        plan_q: where the norm of q rounds; by default once, at its end.
        plan_k: where the norm of k rounds; by default once, at its end.

    Returns:
        `QKRMSNorm(q, k, v)`, each with the shape of its input, laid out like it, in the type of its
        plan's `out`.

    Raises:
        TypeError, ValueError: a type, shape or device does not fit.
    """
    norms = checked_norms(q, k, v, weight_q, weight_k, eps, offset, (plan_q, plan_k))
    named = [
        (name, x, RoundingPlan.parse(plan).out)
        for name, x, plan in zip(("q", "k"), norms.xs, norms.plans, strict=False)
    ]
    rotations = checked_rotations(named, cos, sin, layout, rotary_dim)
    rotations += ["none"] * (len(norms.xs) - 2)
    xs, weights, *numbers = norms
    results = QK_RMS_NORM_ROPE(xs, weights, cos, sin, *numbers, rotations)
    return QKRMSNorm(results[0], results[1], None if v is None else results[2])
