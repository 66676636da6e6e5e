"""x -> RMSNorm -> + residual -> RMSNorm, both used  =>  normfuse::rms_norm_add_rms_norm."""

from __future__ import annotations

from torch.fx import Node

from normfuse.ops import RMS_NORM, RMS_NORM_ADD, RMS_NORM_ADD_RMS_NORM
from normfuse.patterns.rule import (
    Context,
    Rule,
    emit,
    erase,
    existing_result,
    fakes_of,
    insertion_point,
    result,
)


def _apply(node: Node, context: Context) -> Node | None:
    if node.target is not RMS_NORM:
        return None
    total, weight_2, eps_tensor, *norm_2 = node.args
    first = _sum_behind(total)
    if first is None or eps_tensor is not None or existing_result(first, 1):
        return None
    assert isinstance(total, Node)
    x, residual, weight_1, *scales_and_norm_1 = first.args
    context.mutations.forbid_between((first, total, node))
    users = [user for user in total.users if user is not node]
    fused = emit(
        context,
        RMS_NORM_ADD_RMS_NORM,
        (x, residual, weight_1, weight_2, *scales_and_norm_1, *norm_2),
        (
            fakes_of(context, node)[0],
            fakes_of(context, first)[0],
            fakes_of(context, first)[1],
            fakes_of(context, node)[1],
        ),
        before=insertion_point([weight_2], first, users),
        like=node,
    )
    for index, old in ((0, existing_result(node, 0)), (3, existing_result(node, 1)), (1, total)):
        if old is not None:
            old.replace_all_uses_with(result(context, fused, index))
    erase((first, total, node))
    return fused


def _sum_behind(total: object) -> Node | None:
    """The `rms_norm_add` whose sum is `total`."""
    if not isinstance(total, Node) or not total.args or not isinstance(total.args[0], Node):
        return None
    first = total.args[0]
    return first if first.target is RMS_NORM_ADD and total is existing_result(first, 0) else None


RULE = Rule(
    name="rms_norm_add_rms_norm",
    before="x -> RMSNorm [-> * scale] -> + residual [-> * scale] -> RMSNorm",
    families="Gemma 2, 3 and 4, GLM 4, T5Gemma 2; inside a layer and across layers",
    apply=_apply,
)
