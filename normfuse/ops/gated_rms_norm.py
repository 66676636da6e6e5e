"""RMSNorm with a gate: norm(x) * act(gate), or norm(x * act(gate)); the norm may run in groups.

The output norm of linear attention and of state spaces. Qwen3-Next and Kimi Linear gate what they
have normalised; Mamba 2 gates first, and Zamba 2 then normalises groups of columns.
"""

from __future__ import annotations

from typing import Any

import torch

from normfuse.ops.gated_rms_norm_backward import GATED_RMS_NORM_BACKWARD, gated_gradients
from normfuse.ops.gating import ACTIVATIONS, Gating, gated
from normfuse.ops.groups import joined, split, weight_of_groups
from normfuse.ops.registration import needs_plain_torch, register
from normfuse.ops.rms_norm import (
    check_plan,
    rms_norm_fake,
    rms_norm_reference,
)
from normfuse.ops.rounding import RoundingPlan
from normfuse.ops.validation import (
    check_activation,
    check_eps,
    check_groups,
    check_like,
    check_weight,
)

SCHEMA = (
    "gated_rms_norm(Tensor x, Tensor gate, Tensor? weight, float eps, float offset, int groups,"
    " bool gate_first, str activation, str plan, str gating) -> (Tensor y, Tensor rstd)"
)


def gated_rms_norm_reference(
    x: torch.Tensor,
    gate: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    offset: float,
    groups: int,
    gate_first: bool,
    activation: str,
    plan: str,
    gating: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The meaning: x, gate (..., N) -> y (..., N), rstd (..., 1), or (..., groups, 1).

    `weight` is None, (N,), or (N / groups,) and the same for all groups.
    """
    types = Gating.parse(gating)
    if gate_first:
        x = gated(x, gate, activation, types)
    factor = weight_of_groups(weight, x, groups)
    y, rstd = rms_norm_reference(split(x, groups), factor, None, eps, offset, plan)
    y = joined(y, groups)
    if not gate_first:
        y = gated(y, gate, activation, types)
    return y, rstd


def gated_rms_norm_fake(
    x: torch.Tensor,
    gate: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    offset: float,
    groups: int,
    gate_first: bool,
    activation: str,
    plan: str,
    gating: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    types = Gating.parse(gating)
    if gate_first:
        x = gated(x, gate, activation, types)
    y, rstd = rms_norm_fake(x, None, None, eps, offset, plan)
    if groups > 1:
        rstd = x.new_empty((*x.shape[:-1], groups, 1), dtype=rstd.dtype)
    return y if gate_first else gated(y, gate, activation, types), rstd


def _cuda(x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor | None, *arguments: Any) -> Any:
    from normfuse.ops.kernels.gated_rms_norm import launch

    eps, offset, groups, gate_first, activation, plan, gating = arguments
    types = RoundingPlan.parse(plan), Gating.parse(gating)
    return launch(x, gate, weight, eps, offset, groups, gate_first, activation, *types)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    x, gate, weight, *norm = inputs
    ctx.save_for_backward(x, gate, weight, output[1])
    ctx.norm = norm
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_y: torch.Tensor | None, grad_rstd: torch.Tensor | None) -> Any:
    x, gate, weight, rstd = ctx.saved_tensors
    _, offset, groups, gate_first, activation, plan, _ = ctx.norm
    norm = (x, gate, weight, rstd, offset, groups, gate_first, activation)
    mask = ctx.needs_input_grad[:3]
    if grad_y is not None and grad_rstd is None and not needs_plain_torch():
        grads = GATED_RMS_NORM_BACKWARD(grad_y, *norm, plan, list(mask))
    else:
        grads = gated_gradients(grad_y, grad_rstd, *norm, mask)
    return *grads, *(None,) * 7


GATED_RMS_NORM = register(
    SCHEMA,
    reference=gated_rms_norm_reference,
    fake=gated_rms_norm_fake,
    cuda=_cuda,
    setup_context=_setup_context,
    backward=_backward,
)


def gated_rms_norm(
    x: torch.Tensor,
    gate: torch.Tensor,
    weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    *,
    offset: float = 0.0,
    groups: int = 1,
    gate_first: bool = False,
    activation: str = "silu",
    plan: RoundingPlan | None = None,
    gating: Gating | None = None,
) -> torch.Tensor:
    """RMSNorm(x) * act(gate), or with `gate_first` RMSNorm(x * act(gate)).

    Args:
        x: (..., N), float16, bfloat16, float32 or float64; rows of any stride.
        gate: (..., N), any of these types.
        weight: (N,), (N / groups,) for one that all groups share, or None for a weightless norm.
        eps: added to the mean of the squares.
        offset: added to the weight; 1.0 for Gemma's norms.
        groups: the statistic is taken over each of this many groups of neighbouring columns.
        gate_first: whether the gate multiplies x, as in Mamba 2, or the norm, as in Qwen3-Next.
        activation: "silu", "sigmoid", or "x_sigmoid" for a silu whose sigmoid is rounded.
        plan: where the norm rounds; by default once, at the end of it all.
        gating: where the gate rounds; by default once, at the end of it all.

    Returns:
        (..., N) in `plan.out` with `gate_first`, else in `gating.out`; by default the type of x.

    Raises:
        TypeError, ValueError: a type, shape or device does not fit.
    """
    check_activation("x", x)
    check_like("gate", gate, x)
    check_groups(groups, x)
    is_shared = isinstance(weight, torch.Tensor) and groups > 1 and weight.shape != x.shape[-1:]
    check_weight("weight", weight, split(x, groups) if is_shared else x)
    check_eps("eps", eps)
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {ACTIVATIONS}, got {activation!r}: choose one")
    wide = torch.promote_types(x.dtype, torch.float32)
    types = gating or Gating.once(wide if gate_first else x.dtype)
    if plan is None:
        weight_dtype = None if weight is None else weight.dtype
        plan = RoundingPlan.once(wide, weight_dtype)
        plan = plan.with_out(x.dtype) if gate_first else plan
    check_plan("plan", plan, weight)
    y: torch.Tensor = GATED_RMS_NORM(
        x, gate, weight, eps, offset, groups, gate_first, activation, str(plan), str(types)
    )[0]
    return y
