"""RMSNorm: y = x / sqrt(mean(x^2) + eps) * (weight + offset), over the last axis.

Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019. The offset is 1 in Gemma's and
Qwen3-Next's norms, whose weight is stored around zero; it is added in the kernel at every call, so
that no folded copy of the weight exists that could go stale.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from normfuse.ops.registration import needs_plain_torch, register
from normfuse.ops.rms_norm_backward import RMS_NORM_BACKWARD, norm_gradients
from normfuse.ops.rounding import L2, RoundingPlan
from normfuse.ops.validation import check_activation, check_eps, check_weight

SCHEMA = (
    "rms_norm(Tensor x, Tensor? weight, Tensor? eps_tensor, float eps, float offset, str plan)"
    " -> (Tensor y, Tensor rstd)"
)


def rms_norm_reference(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    eps_tensor: torch.Tensor | None,
    eps: float,
    offset: float,
    plan: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The meaning: x (..., N), weight (N,) or None -> y (..., N) in `plan.out`, rstd (..., 1).

    `eps_tensor`, a tensor of one element, replaces `eps` where the model keeps its eps in a buffer.
    """
    steps = RoundingPlan.parse(plan)
    h = x.to(steps.compute)
    variance = _mean_of_squares(h, steps.mean)
    bound = eps if eps_tensor is None else eps_tensor
    if not steps.bounded:
        variance, bound = variance + bound, 0.0
    y, rstd = _normalised(h if steps.unit[0] == steps.compute else x, variance, bound, steps)
    if steps.weight is not None:
        assert weight is not None
        y = _scaled(y, weight, offset, steps.weight)
    return y.to(steps.out), rstd


def _mean_of_squares(h: torch.Tensor, mean: str) -> torch.Tensor:
    squares = h.pow(2)
    if mean == "mean":
        return squares.mean(-1, keepdim=True)
    total = squares.sum(-1, keepdim=True)
    if mean == L2:
        return total
    return total / h.shape[-1] if mean == "sum_divided" else total * (1.0 / h.shape[-1])


def _normalised(
    x: torch.Tensor, variance: torch.Tensor, bound: float | torch.Tensor, steps: RoundingPlan
) -> tuple[torch.Tensor, torch.Tensor]:
    x = x.to(steps.unit[0])
    if steps.root == "divide_by_sqrt":
        root = variance.sqrt()
        if steps.bounded:
            root = root.clamp(min=bound)
        return _unit(x, root, steps), root.reciprocal()
    if steps.root == "rsqrt":
        rstd = variance.rsqrt()
    elif steps.root == "pow":
        rstd = variance.pow(-0.5)
    else:
        rstd = variance.sqrt().reciprocal()
    return _unit(x, rstd, steps), rstd


def normalised_by(
    x: torch.Tensor, weight: torch.Tensor | None, rstd: torch.Tensor, offset: float, plan: str
) -> torch.Tensor:
    """y of `rms_norm_reference` again, from the inverse root (..., 1) that it returned."""
    steps = RoundingPlan.parse(plan)
    root = rstd.reciprocal() if steps.root == "divide_by_sqrt" else rstd
    y = _unit(x.to(steps.unit[0]), root, steps)
    if steps.weight is not None:
        assert weight is not None
        y = _scaled(y, weight, offset, steps.weight)
    return y.to(steps.out)


def _unit(x: torch.Tensor, root: torch.Tensor, steps: RoundingPlan) -> torch.Tensor:
    root = root.to(steps.rstd).to(steps.unit[0])
    unit = x / root if steps.root == "divide_by_sqrt" else x * root
    for dtype in steps.unit[1:]:
        unit = unit.to(dtype)
    return unit


def _scaled(
    unit: torch.Tensor,
    weight: torch.Tensor,
    offset: float,
    dtypes: tuple[torch.dtype, torch.dtype],
) -> torch.Tensor:
    """The operands stand as models write them, and Inductor loads them in that order.

    A bare weight comes first, as in Llama's norm; one that is converted or offset behind the unit
    value, as in Gemma's.
    """
    if not offset and dtypes == (weight.dtype, weight.dtype):
        return weight * unit
    weight = weight.to(dtypes[0])
    return unit * (weight + offset if offset else weight).to(dtypes[1])


def rms_norm_fake(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    eps_tensor: torch.Tensor | None,
    eps: float,
    offset: float,
    plan: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    steps = RoundingPlan.parse(plan)
    # A reduction's result is contiguous, whatever the order of the axes of x.
    rstd = x.new_empty((*x.shape[:-1], 1), dtype=steps.compute)
    return torch.empty_like(x, dtype=steps.out), rstd


def _cuda(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    eps_tensor: torch.Tensor | None,
    eps: float,
    offset: float,
    plan: str,
) -> Any:
    from normfuse.ops.kernels.rms_norm import launch

    return launch(x, weight, eps_tensor, eps, offset, RoundingPlan.parse(plan))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    x, weight, _, _, offset, plan = inputs
    ctx.save_for_backward(x, weight, output[1])
    ctx.norm = (offset, plan)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_y: torch.Tensor | None, grad_rstd: torch.Tensor | None) -> Any:
    x, weight, rstd = ctx.saved_tensors
    offset, plan = ctx.norm
    mask = ctx.needs_input_grad[:2]
    grads = gradients(grad_y, grad_rstd, x, weight, rstd, offset, plan, mask)
    return *grads, None, None, None, None


def gradients(
    grad_y: torch.Tensor | None,
    grad_rstd: torch.Tensor | None,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    rstd: torch.Tensor,
    offset: float,
    plan: str,
    output_mask: Sequence[bool],
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Gradients of x and weight, in their types: by one op unless they need more than it has."""
    if grad_y is not None and grad_rstd is None and not needs_plain_torch():
        grads = RMS_NORM_BACKWARD(grad_y, x, weight, rstd, offset, plan, list(output_mask))
        return grads[0], grads[1]
    mean = RoundingPlan.parse(plan).mean
    grad_x, grad_weight = norm_gradients(
        grad_y, grad_rstd, x, weight, rstd, offset, mean=mean, output_mask=output_mask
    )
    return None if grad_x is None else grad_x.to(x.dtype), grad_weight


RMS_NORM = register(
    SCHEMA,
    reference=rms_norm_reference,
    fake=rms_norm_fake,
    cuda=_cuda,
    setup_context=_setup_context,
    backward=_backward,
)


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    *,
    offset: float = 0.0,
    plan: RoundingPlan | None = None,
) -> torch.Tensor:
    """RMSNorm over the last axis: x / sqrt(mean(x^2) + eps) * (weight + offset).

    Args:
        x: (..., N), float16, bfloat16, float32 or float64; rows of any stride.
        weight: (N,), any of these types, or None for a weightless norm.
        eps: added to the mean of the squares.
        offset: added to the weight; 1.0 for Gemma's norms.
        plan: where the roundings fall; by default once, at the end, as in
            `torch.nn.functional.rms_norm`. `RoundingPlan.before_weight(x.dtype, weight.dtype)` is
            Llama's.

    Returns:
        (..., N) in `plan.out`, by default the type of x.

    Raises:
        TypeError, ValueError: a type, shape or device does not fit.
    """
    check_activation("x", x)
    check_weight("weight", weight, x)
    check_eps("eps", eps)
    steps = plan or RoundingPlan.once(x.dtype, None if weight is None else weight.dtype)
    check_plan("plan", steps, weight)
    y: torch.Tensor = RMS_NORM(x, weight, None, eps, offset, str(steps))[0]
    return y


def check_plan(name: str, plan: RoundingPlan, weight: torch.Tensor | None) -> None:
    """`plan` must speak of a weight exactly when there is one."""
    if (plan.weight is None) != (weight is None):
        raise ValueError(
            f"{name} must {'have no' if weight is None else 'name the'} weight types for this "
            f"call, got '{plan}': build it for the weight that is passed"
        )
