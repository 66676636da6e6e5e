"""The forms that each op can be lowered to, found by its overload."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from normfuse.ops.add_rms_norm import ADD_RMS_NORM, add_rms_norm_reference
from normfuse.ops.dual_rms_norm_add import (
    DUAL_RMS_NORM_ADD,
    dual_rms_norm_add_reference,
    parsed,
    split_norms,
)
from normfuse.ops.dual_rms_norm_add_rms_norm import (
    DUAL_RMS_NORM_ADD_RMS_NORM,
    dual_rms_norm_add_rms_norm_reference,
)
from normfuse.ops.gated_rms_norm import GATED_RMS_NORM, gated_rms_norm_reference
from normfuse.ops.gating import Gating
from normfuse.ops.joint import obstacle_to_joint_norms
from normfuse.ops.l2_norm import L2_NORM, l2_norm_reference
from normfuse.ops.lowering_backward import BACKWARD_LAUNCHES, BACKWARD_REFERENCES
from normfuse.ops.modulated_rms_norm import MODULATED_RMS_NORM, modulated_rms_norm_reference
from normfuse.ops.modulation import Modulation
from normfuse.ops.one_launch import obstacle_to_one_launch
from normfuse.ops.qk_rms_norm import QK_RMS_NORM, qk_rms_norm_reference
from normfuse.ops.qk_rms_norm_rope import QK_RMS_NORM_ROPE, qk_rms_norm_rope_reference
from normfuse.ops.qk_rms_norm_rope_backward import QK_RMS_NORM_ROPE_BACKWARD
from normfuse.ops.residual_sum import Scales
from normfuse.ops.rms_norm import RMS_NORM, rms_norm_reference
from normfuse.ops.rms_norm_add import RMS_NORM_ADD, rms_norm_add_reference
from normfuse.ops.rms_norm_add_rms_norm import (
    RMS_NORM_ADD_RMS_NORM,
    rms_norm_add_rms_norm_reference,
)
from normfuse.ops.rms_norms import RMS_NORMS, rms_norms_reference, weight_of_each
from normfuse.ops.rope import ROPE, parsed_rotations, rope_reference
from normfuse.ops.rotation import Rotation
from normfuse.ops.rounding import RoundingPlan

_REFERENCES: dict[Any, Callable[..., Any]] = {
    RMS_NORM: rms_norm_reference,
    RMS_NORMS: rms_norms_reference,
    L2_NORM: l2_norm_reference,
    GATED_RMS_NORM: gated_rms_norm_reference,
    MODULATED_RMS_NORM: modulated_rms_norm_reference,
    ADD_RMS_NORM: add_rms_norm_reference,
    RMS_NORM_ADD: rms_norm_add_reference,
    RMS_NORM_ADD_RMS_NORM: rms_norm_add_rms_norm_reference,
    QK_RMS_NORM: qk_rms_norm_reference,
    QK_RMS_NORM_ROPE: qk_rms_norm_rope_reference,
    ROPE: rope_reference,
    DUAL_RMS_NORM_ADD: dual_rms_norm_add_reference,
    DUAL_RMS_NORM_ADD_RMS_NORM: dual_rms_norm_add_rms_norm_reference,
    **BACKWARD_REFERENCES,
}
ALL_OPS = tuple(_REFERENCES)
_SHARED_BACKWARDS = {"l2_norm": "rms_norm_backward", "qk_rms_norm": "qk_rms_norm_rope_backward"}


def backward_of(op: str) -> str:
    """The name of the op that computes the gradients of an op."""
    return _SHARED_BACKWARDS.get(op, f"{op}_backward")


def inline_form(op: Any) -> Callable[..., Any]:
    """The plain torch form, which Inductor fuses with its neighbours."""
    return _REFERENCES[op]


def kernel_form(
    op: Any, used: tuple[bool, ...], wrap: Any = torch.library.wrap_triton
) -> Callable[..., Any]:
    """A function of the op's arguments that launches its kernel in sight of the compiler.

    Args:
        op: the overload.
        used: for each result of the op, whether anything reads it; the kernel does not store the
            others.
        wrap: how the compiler sees the launch; `kernels.tile.eager` launches without a compiler.

    That of queries and keys takes `writes`, too: what it writes elsewhere, `destinations.Writes`.
    """
    launch = _LAUNCHES[op]

    def form(*arguments: Any, **how: Any) -> Any:
        return launch(wrap, used, *arguments, **how)

    return form


def obstacle_to_kernel(op: Any, arguments: tuple[Any, ...]) -> str | None:
    """Why a site cannot take the Triton form, as a sentence; None if it can."""
    activations = arguments[0] if isinstance(arguments[0], (list, tuple)) else arguments[:1]
    if not all(isinstance(x.shape[-1], int) for x in activations):
        return (
            "the width of the normalised axis is symbolic, and the kernel is compiled for one width"
        )
    for value in tree_leaves(arguments):
        if isinstance(value, torch.SymFloat):
            return "eps or a scale is symbolic, and the kernel is compiled for its value"
    if op in (QK_RMS_NORM, QK_RMS_NORM_ROPE, ROPE, QK_RMS_NORM_ROPE_BACKWARD):
        obstacle = obstacle_to_one_launch(activations) or _obstacle_to_joint_norms(op, arguments)
        if obstacle is not None:
            return obstacle
    return None if find_spec("triton") else "triton is not installed"


def _obstacle_to_joint_norms(op: Any, arguments: tuple[Any, ...]) -> str | None:
    if op not in (QK_RMS_NORM, QK_RMS_NORM_ROPE):
        return None
    xs, weights, *rest = arguments
    cos, plans = (rest[0], rest[-2]) if op is QK_RMS_NORM_ROPE else (None, rest[-1])
    return obstacle_to_joint_norms(xs, weight_of_each(weights, plans), cos)


def _launch_rms_norm(wrap: Any, used: tuple[bool, ...], *arguments: Any) -> Any:
    from normfuse.ops.kernels.rms_norm import launch

    x, weight, eps_tensor, eps, offset, plan = arguments
    steps = RoundingPlan.parse(plan)
    return launch(x, weight, eps_tensor, eps, offset, steps, store_rstd=used[1], wrap=wrap)


def _launch_rms_norms(wrap: Any, used: tuple[bool, ...], *arguments: Any) -> Any:
    from normfuse.ops.kernels.rms_norms import launch

    x, weights, eps, offsets, scales, plans = arguments
    steps = [RoundingPlan.parse(plan) for plan in plans]
    each = weight_of_each(weights, plans)
    return launch(x, each, eps, offsets, scales, steps, stored=used, wrap=wrap)


def _launch_l2_norm(wrap: Any, used: tuple[bool, ...], *arguments: Any) -> Any:
    from normfuse.ops.kernels.l2_norm import launch

    x, eps_tensor, eps, plan = arguments
    steps = RoundingPlan.parse(plan)
    return launch(x, None, eps_tensor, eps, 0.0, steps, store_rstd=used[1], wrap=wrap)


def _launch_gated_rms_norm(wrap: Any, used: tuple[bool, ...], *arguments: Any) -> Any:
    from normfuse.ops.kernels.gated_rms_norm import launch

    x, gate, weight, eps, offset, groups, gate_first, activation, plan, gating = arguments
    norm = (eps, offset, groups, gate_first, activation)
    types = RoundingPlan.parse(plan), Gating.parse(gating)
    return launch(x, gate, weight, *norm, *types, store_rstd=used[1], wrap=wrap)


def _launch_modulated_rms_norm(wrap: Any, used: tuple[bool, ...], *arguments: Any) -> Any:
    from normfuse.ops.kernels.modulated_rms_norm import launch

    x, scale, shift, weight, eps, offset, scale_offset, plan, modulation = arguments
    types = RoundingPlan.parse(plan), Modulation.parse(modulation)
    norm = (eps, offset, scale_offset)
    return launch(x, scale, shift, weight, *norm, *types, store_rstd=used[1], wrap=wrap)


def _launch_add_rms_norm(wrap: Any, used: tuple[bool, ...], *arguments: Any) -> Any:
    from normfuse.ops.kernels.add_rms_norm import launch

    x, residual, weight, *scales, eps, offset, plan = arguments
    return launch(
        x,
        residual,
        weight,
        Scales(*scales),
        eps,
        offset,
        RoundingPlan.parse(plan),
        store_total=used[1],
        store_rstd=used[2],
        wrap=wrap,
    )


def _launch_rms_norm_add(wrap: Any, used: tuple[bool, ...], *arguments: Any) -> Any:
    from normfuse.ops.kernels.rms_norm_add import launch

    x, residual, weight, *scales, eps, offset, plan = arguments
    return launch(
        x,
        residual,
        weight,
        Scales(*scales),
        eps,
        offset,
        RoundingPlan.parse(plan),
        store_rstd=used[1],
        wrap=wrap,
    )


def _launch_rms_norm_add_rms_norm(wrap: Any, used: tuple[bool, ...], *arguments: Any) -> Any:
    from normfuse.ops.kernels.rms_norm_add_rms_norm import launch

    x, residual, weight_1, weight_2, *scales = arguments[:8]
    eps_1, offset_1, plan_1, eps_2, offset_2, plan_2 = arguments[8:]
    return launch(
        x,
        residual,
        weight_1,
        weight_2,
        Scales(*scales),
        eps_1,
        offset_1,
        RoundingPlan.parse(plan_1),
        eps_2,
        offset_2,
        RoundingPlan.parse(plan_2),
        store_total=used[1],
        store_rstd_1=used[2],
        store_rstd_2=used[3],
        wrap=wrap,
    )


def _launch_qk_rms_norm(wrap: Any, used: tuple[bool, ...], *arguments: Any, **how: Any) -> Any:
    from normfuse.ops.kernels.qk_rms_norm import launch

    xs, weights, eps, offsets, plans = arguments
    steps = [RoundingPlan.parse(plan) for plan in plans]
    norms = weight_of_each(weights, plans), eps, offsets, steps
    return launch(xs, *norms, stores=used, wrap=wrap, **how)


def _launch_qk_rms_norm_rope(wrap: Any, used: tuple[bool, ...], *arguments: Any, **how: Any) -> Any:
    from normfuse.ops.kernels.qk_rms_norm_rope import launch

    xs, weights, cos, sin, eps, offsets, plans, rotations = arguments
    steps = [RoundingPlan.parse(plan) for plan in plans]
    turns = [Rotation.parse(rotation) for rotation in rotations]
    norms = weight_of_each(weights, plans), cos, sin, eps, offsets, steps, turns
    return launch(xs, *norms, stores=used, wrap=wrap, **how)


def _launch_rope(wrap: Any, used: tuple[bool, ...], *arguments: Any, **how: Any) -> Any:
    from normfuse.ops.kernels.rope import launch

    xs, cos, sin, rotations = arguments
    return launch(xs, cos, sin, parsed_rotations(rotations), wrap=wrap, **how)


def _launch_dual(num_norms: int, wrap: Any, used: tuple[bool, ...], *arguments: Any) -> Any:
    from normfuse.ops.kernels.dual_rms_norm_add import launch

    x_1, x_2, residual = arguments[:3]
    weights = arguments[3 : 3 + num_norms]
    scales, *norms = split_norms(arguments[3 + num_norms :])
    factors, steps = Scales(*scales), parsed(norms)
    return launch(x_1, x_2, residual, weights, factors, steps, stored=used, wrap=wrap)


_LAUNCHES: dict[Any, Callable[..., Any]] = {
    RMS_NORM: _launch_rms_norm,
    RMS_NORMS: _launch_rms_norms,
    L2_NORM: _launch_l2_norm,
    GATED_RMS_NORM: _launch_gated_rms_norm,
    MODULATED_RMS_NORM: _launch_modulated_rms_norm,
    ADD_RMS_NORM: _launch_add_rms_norm,
    RMS_NORM_ADD: _launch_rms_norm_add,
    RMS_NORM_ADD_RMS_NORM: _launch_rms_norm_add_rms_norm,
    QK_RMS_NORM: _launch_qk_rms_norm,
    QK_RMS_NORM_ROPE: _launch_qk_rms_norm_rope,
    ROPE: _launch_rope,
    DUAL_RMS_NORM_ADD: partial(_launch_dual, 3),
    DUAL_RMS_NORM_ADD_RMS_NORM: partial(_launch_dual, 4),
    **BACKWARD_LAUNCHES,
}
