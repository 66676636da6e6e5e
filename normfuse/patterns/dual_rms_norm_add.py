"""RMSNorm(x_1) + RMSNorm(x_2) -> RMSNorm -> + residual  =>  normfuse::dual_rms_norm_add."""

from __future__ import annotations

from dataclasses import replace

from torch.fx import Node

from normfuse.ops import DUAL_RMS_NORM_ADD, RMS_NORM
from normfuse.patterns.micro_ops import fake_of
from normfuse.patterns.residual_sum import NO_SCALE, ResidualSum, read_sum, sum_after
from normfuse.patterns.rms_norm_add import scale_after_sum
from normfuse.patterns.rule import (
    Context,
    Rule,
    emit,
    erase,
    existing_result,
    fakes_of,
    is_pure,
    result,
)


def _apply(node: Node, context: Context) -> Node | None:
    if node.target is RMS_NORM:
        return _join(node, context)
    if node.target is DUAL_RMS_NORM_ADD:
        return scale_after_sum(node, context)
    return None


def _join(node: Node, context: Context) -> Node | None:
    branch, normed = node.args[0], _only_result(node)
    first_two = _norms_behind(branch)
    found = _sum_after(normed) if normed is not None else None
    if normed is None or first_two is None or found is None:
        return None
    assert isinstance(branch, Node)
    norms = (*first_two, node)
    context.mutations.forbid_between((*norms, branch, *found.nodes))
    fused = emit(
        context,
        DUAL_RMS_NORM_ADD,
        (
            *(norm.args[0] for norm in first_two),
            found.residual,
            *(norm.args[1] for norm in norms),
            *found.scales(),
            *(value for norm in norms for value in norm.args[3:]),
        ),
        (fake_of(found.total), *(fakes_of(context, norm)[1] for norm in norms)),
        before=found.total,
        like=node,
    )
    found.total.replace_all_uses_with(result(context, fused, 0))
    erase(context, (*norms, branch, normed, *found.nodes))
    return fused


def _sum_after(normed: Node) -> ResidualSum | None:
    """The residual sum; a factor that is written in place waits for `scale_after_sum`."""
    found = sum_after(normed)
    if found is None or found.total_scale == NO_SCALE or is_pure(found.total):
        return found
    *nodes, total, _ = found.nodes
    return replace(found, total_scale=NO_SCALE, total=total, nodes=(*nodes, total))


def _norms_behind(branch: object) -> tuple[Node, Node] | None:
    """The two norms whose sum is `branch`, where neither they nor it have another user."""
    found = read_sum(branch) if isinstance(branch, Node) else None
    if found is None or len(found.total.users) != 1:
        return None
    if (found.branch_scale, found.total_scale) != (NO_SCALE, NO_SCALE):
        return None
    first, second = _norm_behind(found.residual), _norm_behind(found.branch)
    return None if first is None or second is None or first is second else (first, second)


def _norm_behind(value: Node) -> Node | None:
    norm = value.args[0] if value.args else None
    if not isinstance(norm, Node) or norm.target is not RMS_NORM:
        return None
    return norm if _only_result(norm) is value and len(value.users) == 1 else None


def _only_result(norm: Node) -> Node | None:
    """The result of a norm with a plain eps whose rstd nobody reads."""
    is_plain = norm.args[2] is None and existing_result(norm, 1) is None
    return existing_result(norm, 0) if is_plain else None


RULE = Rule(
    name="dual_rms_norm_add",
    before="x -> RMSNorm, + x -> RMSNorm, -> RMSNorm [-> * scale] -> + residual [-> * scale]",
    families="Gemma 4's dense branch and experts",
    apply=_apply,
)
