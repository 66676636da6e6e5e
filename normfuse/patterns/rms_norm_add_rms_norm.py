"""x -> RMSNorm -> + residual -> RMSNorm, both used  =>  normfuse::rms_norm_add_rms_norm."""

from __future__ import annotations

from torch._ops import OpOverload
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
    return norm_after_sum(node, context, RMS_NORM_ADD, RMS_NORM_ADD_RMS_NORM)


def norm_after_sum(
    node: Node, context: Context, first_op: OpOverload, op: OpOverload
) -> Node | None:
    """The norm `node` of the sum that `first_op` returns, joined with it to `op`.

    `op` takes the arguments of `first_op`, the weight of the norm behind the other weights and the
    rest of the norm at the end; it returns y, then what `first_op` returns, then the rstd of y.
    """
    if node.target is not RMS_NORM:
        return None
    total, weight, eps_tensor, *norm = node.args
    first = _sum_behind(total, first_op)
    if first is None or eps_tensor is not None or weight is total:
        return None
    if any(user is not total for user in first.users if user.users):
        return None
    assert isinstance(total, Node)
    num_tensors = [argument.name for argument in first_op._schema.arguments].index(
        "branch_scale_tensor"
    )
    context.mutations.forbid_between((first, total, node))
    users = [user for user in total.users if user is not node]
    y, rstd = fakes_of(context, node)
    fused = emit(
        context,
        op,
        (*first.args[:num_tensors], weight, *first.args[num_tensors:], *norm),
        (y, *fakes_of(context, first), rstd),
        before=insertion_point([weight, *norm], first, users),
        like=node,
    )
    last = len(fakes_of(context, fused)) - 1
    olds = ((0, existing_result(node, 0)), (last, existing_result(node, 1)), (1, total))
    for index, old in olds:
        if old is not None:
            old.replace_all_uses_with(result(context, fused, index))
    erase(context, (first, total, node))
    return fused


def _sum_behind(total: object, op: OpOverload) -> Node | None:
    """The call of `op` whose sum is `total`."""
    if not isinstance(total, Node) or not total.args or not isinstance(total.args[0], Node):
        return None
    first = total.args[0]
    return first if first.target is op and total is existing_result(first, 0) else None


RULE = Rule(
    name="rms_norm_add_rms_norm",
    before="x -> RMSNorm [-> * scale] -> + residual [-> * scale] -> RMSNorm",
    families="Gemma 2, 3 and 4, GLM 4, T5Gemma 2; inside a layer and across layers",
    apply=_apply,
)
