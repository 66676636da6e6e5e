"""Two branches, each normalised, added, normalised again, and added to the residual:

    total = residual + norm_3(norm_1(x_1) + norm_2(x_2))

The end of a Gemma 4 layer with experts: x_1 is the dense branch, x_2 the experts. The factors of
`residual_sum` may scale the last norm and the sum (Gemma 4's layer scalar).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from normfuse.ops.dual_rms_norm_add_backward import DUAL_RMS_NORM_ADD_BACKWARD
from normfuse.ops.registration import needs_plain_torch, register
from normfuse.ops.residual_sum import SCALE_SCHEMA, Scales, residual_sum_backward
from normfuse.ops.rms_norm import (
    check_plan,
    rms_norm_fake,
    rms_norm_reference,
)
from normfuse.ops.rms_norm_add import rms_norm_add_fake, rms_norm_add_reference
from normfuse.ops.rms_norm_backward import norm_gradients
from normfuse.ops.rounding import RoundingPlan
from normfuse.ops.validation import (
    check_activation,
    check_eps,
    check_residual,
    check_scale,
    check_weight,
)

SCHEMA = (
    "dual_rms_norm_add(Tensor x_1, Tensor x_2, Tensor residual,"
    f" Tensor? weight_1, Tensor? weight_2, Tensor? weight_3, {SCALE_SCHEMA},"
    " float eps_1, float offset_1, str plan_1, float eps_2, float offset_2, str plan_2,"
    " float eps_3, float offset_3, str plan_3)"
    " -> (Tensor total, Tensor rstd_1, Tensor rstd_2, Tensor rstd_3)"
)

Results = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def dual_rms_norm_add_reference(
    x_1: torch.Tensor,
    x_2: torch.Tensor,
    residual: torch.Tensor,
    weight_1: torch.Tensor | None,
    weight_2: torch.Tensor | None,
    weight_3: torch.Tensor | None,
    *arguments: Any,
) -> Results:
    """The meaning: x_1, x_2, residual (..., N) -> total (..., N), three rstd (..., 1).

    `arguments` are the rest of the schema.
    """
    scales, norm_1, norm_2, norm_3 = split_norms(arguments)
    branch_1, rstd_1 = rms_norm_reference(x_1, weight_1, None, *norm_1)
    branch_2, rstd_2 = rms_norm_reference(x_2, weight_2, None, *norm_2)
    branch = branch_1 + branch_2
    total, rstd_3 = rms_norm_add_reference(branch, residual, weight_3, *scales, *norm_3)
    return total, rstd_1, rstd_2, rstd_3


def split_norms(arguments: tuple[Any, ...]) -> list[tuple[Any, ...]]:
    """The four scales, then the (eps, offset, plan) of each norm."""
    starts = range(4, len(arguments), 3)
    return [arguments[:4], *(arguments[start : start + 3] for start in starts)]


def dual_rms_norm_add_fake(
    x_1: torch.Tensor,
    x_2: torch.Tensor,
    residual: torch.Tensor,
    weight_1: torch.Tensor | None,
    weight_2: torch.Tensor | None,
    weight_3: torch.Tensor | None,
    *arguments: Any,
) -> Results:
    scales, norm_1, norm_2, norm_3 = split_norms(arguments)
    branch_1, rstd_1 = rms_norm_fake(x_1, weight_1, None, *norm_1)
    branch_2, rstd_2 = rms_norm_fake(x_2, weight_2, None, *norm_2)
    branch = branch_1 + branch_2
    total, rstd_3 = rms_norm_add_fake(branch, residual, weight_3, *scales, *norm_3)
    return total, rstd_1, rstd_2, rstd_3


def _cuda(x_1: torch.Tensor, x_2: torch.Tensor, residual: torch.Tensor, *arguments: Any) -> Any:
    from normfuse.ops.kernels.dual_rms_norm_add import launch

    scales, *norms = split_norms(arguments[3:])
    return launch(x_1, x_2, residual, arguments[:3], Scales(*scales), parsed(norms))


def parsed(norms: list[tuple[Any, ...]]) -> list[tuple[float, float, RoundingPlan]]:
    """The norms with their plans as values."""
    return [(eps, offset, RoundingPlan.parse(plan)) for eps, offset, plan in norms]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Results) -> None:
    ctx.save_for_backward(*saved_inputs(inputs, 3), *output[1:])
    ctx.numbers = inputs[8:]
    ctx.dtypes = (inputs[2].dtype, output[0].dtype)
    ctx.set_materialize_grads(False)


def saved_inputs(inputs: tuple[Any, ...], num_norms: int) -> tuple[torch.Tensor | None, ...]:
    """x_1, x_2, residual if a scale learns, the weights, two scale tensors."""
    x_1, x_2, residual, *rest = inputs[: 5 + num_norms]
    return x_1, x_2, residual if Scales(*rest[-2:]).learn() else None, *rest


def _backward(ctx: Any, grad_total: torch.Tensor | None, *grad_rstds: torch.Tensor | None) -> Any:
    tensors, rstds = ctx.saved_tensors[:8], ctx.saved_tensors[8:]
    is_plain = tensors[2] is not None or any(grad is not None for grad in grad_rstds)
    if is_plain or needs_plain_torch():
        dtype = ctx.dtypes[0]
        grads = plain_gradients(grad_total, grad_rstds, tensors, rstds, ctx.numbers, dtype)
    else:
        wanted = ctx.needs_input_grad[:6]
        grads = gradients(grad_total, tensors, rstds, ctx.numbers, ctx.dtypes, wanted)
    return *grads, *(None,) * 11


def gradients(
    grad_total: torch.Tensor | None,
    tensors: tuple[Any, ...],
    rstds: tuple[torch.Tensor, ...],
    numbers: tuple[Any, ...],
    dtypes: tuple[torch.dtype, torch.dtype],
    wanted: Sequence[bool],
) -> tuple[torch.Tensor | None, ...]:
    """Gradients of the eight tensors of the schema, by one op; of none if nothing read the sum.

    `tensors`, `rstds` and `numbers` are what the forward op saved, `dtypes` those of residual and
    sum, `wanted` is for x_1, x_2, the residual and the weights.
    """
    if grad_total is None:
        return (None,) * 8
    x_1, x_2, _, *weights, branch_tensor, total_tensor = tensors
    scales, offsets, plans = gathered((branch_tensor, total_tensor, *numbers))
    passes = dtypes[0] == dtypes[1] and not scales.scale_total()
    wants_1, wants_2, wants_residual, *wants_weights = wanted
    grads = DUAL_RMS_NORM_ADD_BACKWARD(
        grad_total, x_1, x_2, [weight for weight in weights if weight is not None], list(rstds),
        *scales, offsets, plans, dtypes[0],
        [wants_1, wants_2, wants_residual and not passes, *wants_weights],
    )  # fmt: skip
    return *grads[:2], grad_total if passes else grads[2], *grads[3:], None, None


def gathered(arguments: tuple[Any, ...]) -> tuple[Scales, list[float], list[str]]:
    """The scales, and the offsets and plans of the norms, from the rest of the schema."""
    scales, *norms = split_norms(arguments)
    return Scales(*scales), [norm[1] for norm in norms], [norm[2] for norm in norms]


def plain_gradients(
    grad_total: torch.Tensor | None,
    grad_rstds: tuple[torch.Tensor | None, ...],
    tensors: tuple[Any, ...],
    rstds: tuple[torch.Tensor, ...],
    numbers: tuple[Any, ...],
    residual_dtype: torch.dtype,
) -> tuple[torch.Tensor | None, ...]:
    """The same in plain torch, for a scale that learns, for rstd, and to differentiate again."""
    x_1, x_2, residual, weight_1, weight_2, weight_3, branch_tensor, total_tensor = tensors
    scales, norm_1, norm_2, norm_3 = split_norms((branch_tensor, total_tensor, *numbers))
    branch_1, _ = rms_norm_reference(x_1, weight_1, None, *norm_1)
    branch_2, _ = rms_norm_reference(x_2, weight_2, None, *norm_2)
    branch = branch_1 + branch_2
    grad_total = torch.zeros_like(branch) if grad_total is None else grad_total
    normed = None
    if residual is not None:
        normed, _ = rms_norm_reference(branch, weight_3, None, *norm_3)
    sums = residual_sum_backward(grad_total, normed, residual, Scales(*scales))
    grad, grad_weight_3 = norm_gradients(
        sums.branch, grad_rstds[2], branch, weight_3, rstds[2], norm_3[1]
    )
    grad_1, grad_weight_1 = norm_gradients(grad, grad_rstds[0], x_1, weight_1, rstds[0], norm_1[1])
    grad_2, grad_weight_2 = norm_gradients(grad, grad_rstds[1], x_2, weight_2, rstds[1], norm_2[1])
    return (
        grad_1.to(x_1.dtype),
        grad_2.to(x_2.dtype),
        sums.residual.to(residual_dtype),
        grad_weight_1,
        grad_weight_2,
        grad_weight_3,
        sums.branch_tensor,
        sums.total_tensor,
    )


DUAL_RMS_NORM_ADD = register(
    SCHEMA,
    reference=dual_rms_norm_add_reference,
    fake=dual_rms_norm_add_fake,
    cuda=_cuda,
    setup_context=_setup_context,
    backward=_backward,
)


def dual_rms_norm_add(
    x_1: torch.Tensor,
    x_2: torch.Tensor,
    residual: torch.Tensor,
    weights: Sequence[torch.Tensor | None] = (None, None, None),
    eps: float = 1e-6,
    *,
    offset: float = 0.0,
    branch_scale: float | torch.Tensor | None = None,
    total_scale: float | torch.Tensor | None = None,
    plans: Sequence[RoundingPlan] | None = None,
) -> torch.Tensor:
    """total = (residual + norm_3(norm_1(x_1) + norm_2(x_2)) * branch_scale) * total_scale.

    Args:
        x_1: (..., N), float16, bfloat16, float32 or float64; the output of one branch.
        x_2: (..., N), any of these types; the output of the other.
        residual: (..., N), any of these types; the residual stream.
        weights: three of (N,), or None for a weightless norm.
        eps: added to the mean of the squares in every norm.
        offset: added to every weight.
        branch_scale: a number or a tensor of one element that multiplies the third norm.
        total_scale: a number or a tensor of one element that multiplies the sum.
        plans: where each norm rounds; by default once, at its end. Sums round to the promoted type.

    Returns:
        total (..., N) in the type that torch promotes the third norm's and the residual's type to.

    Raises:
        TypeError, ValueError: a type, shape, device or number of norms does not fit.
    """
    scales = (branch_scale, total_scale)
    steps = checked_plans(3, (x_1, x_2, residual), weights, eps, scales, plans)
    norms = [value for plan in steps for value in (eps, offset, str(plan))]
    total: torch.Tensor = DUAL_RMS_NORM_ADD(
        x_1, x_2, residual, *weights, *Scales.of(*scales), *norms
    )[0]
    return total


def checked_plans(
    count: int,
    tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    weights: Sequence[torch.Tensor | None],
    eps: float,
    scales: tuple[float | torch.Tensor | None, float | torch.Tensor | None],
    plans: Sequence[RoundingPlan] | None,
) -> Sequence[RoundingPlan]:
    """The plans of a dual op's norms, after a check of its arguments.

    Raises:
        TypeError, ValueError: a type, shape, device or number of norms does not fit.
    """
    x_1, x_2, residual = tensors
    check_activation("x_1", x_1)
    check_residual(x_2, x_1, "x_2", "x_1")
    check_residual(residual, x_1, "residual", "x_1")
    check_eps("eps", eps)
    check_scale("branch_scale", scales[0], x_1)
    check_scale("total_scale", scales[1], x_1)
    for name, values in (("weights", weights), ("plans", weights if plans is None else plans)):
        if len(values) != count:
            raise ValueError(
                f"{name} must have one entry for each of the {count} norms, got {len(values)}: "
                "leave it out where the default serves, or pass them all"
            )
    for index, weight in enumerate(weights):
        check_weight(f"weights[{index}]", weight, x_1)
    plans = _default_plans(tensors, weights) if plans is None else plans
    for index, (plan, weight) in enumerate(zip(plans, weights, strict=True)):
        check_plan(f"plans[{index}]", plan, weight)
    return plans


def _default_plans(
    tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    weights: Sequence[torch.Tensor | None],
) -> list[RoundingPlan]:
    """Each norm in the type that its input has after the sums before it."""
    x_1, x_2, residual = (tensor.dtype for tensor in tensors)
    branch = torch.promote_types(x_1, x_2)
    inputs = (x_1, x_2, branch, torch.promote_types(branch, residual))
    return [
        RoundingPlan.once(dtype, None if weight is None else weight.dtype)
        for dtype, weight in zip(inputs, weights, strict=False)
    ]
