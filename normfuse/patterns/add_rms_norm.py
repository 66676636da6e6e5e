"""x [-> * scale] + residual [-> * scale] -> RMSNorm, both used  =>  normfuse::add_rms_norm."""

from __future__ import annotations

from torch.fx import Node

from normfuse.ops import ADD_RMS_NORM, RMS_NORM
from normfuse.patterns.micro_ops import fake_of
from normfuse.patterns.residual_sum import read_sum
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
    total, weight, eps_tensor, eps, offset, plan = node.args
    found = read_sum(total) if isinstance(total, Node) else None
    if found is None or eps_tensor is not None or weight is total:
        return None
    context.mutations.forbid_between((*found.nodes, node))
    users = [user for user in found.total.users if user is not node]
    fused = emit(
        context,
        ADD_RMS_NORM,
        (found.branch, found.residual, weight, *found.scales(), eps, offset, plan),
        (fakes_of(context, node)[0], fake_of(found.total), fakes_of(context, node)[1]),
        before=insertion_point([weight, eps], found.total, users),
        like=node,
    )
    olds = ((0, existing_result(node, 0)), (2, existing_result(node, 1)), (1, found.total))
    for index, old in olds:
        if old is not None:
            old.replace_all_uses_with(result(context, fused, index))
    erase(context, (node, *found.nodes))
    return fused


RULE = Rule(
    name="add_rms_norm",
    before="x [-> * scale] + residual [-> * scale] -> RMSNorm",
    families="pre-norm models: Llama, Mistral, Qwen, Phi 3, gpt-oss, T5, Mamba; Granite's scale",
    apply=_apply,
)
