"""x -> RMSNorm [-> * scale] -> + residual [-> * scale]  =>  normfuse::rms_norm_add."""

from __future__ import annotations

from typing import cast

from torch._ops import OpOverload
from torch.fx import Node

from normfuse.ops import RMS_NORM, RMS_NORM_ADD
from normfuse.patterns.micro_ops import fake_of
from normfuse.patterns.residual_sum import scaled_by, sum_after
from normfuse.patterns.rule import Context, Rule, emit, erase, existing_result, fakes_of, result


def _apply(node: Node, context: Context) -> Node | None:
    if node.target is RMS_NORM:
        return _add_after_norm(node, context)
    if node.target is RMS_NORM_ADD:
        return scale_after_sum(node, context)
    return None


def _add_after_norm(node: Node, context: Context) -> Node | None:
    x, weight, eps_tensor, eps, offset, plan = node.args
    branch = existing_result(node, 0)
    found = sum_after(branch) if branch is not None else None
    if branch is None or found is None or eps_tensor is not None or existing_result(node, 1):
        return None
    context.mutations.forbid_between((node, *found.nodes))
    fused = emit(
        context,
        RMS_NORM_ADD,
        (x, found.residual, weight, *found.scales(), eps, offset, plan),
        (fake_of(found.total), fakes_of(context, node)[1]),
        before=found.total,
        like=node,
    )
    found.total.replace_all_uses_with(result(context, fused, 0))
    erase(context, (node, branch, *found.nodes))
    return fused


def scale_after_sum(node: Node, context: Context) -> Node | None:
    """A factor of a sum that was out of reach before autograd: one written within `no_grad()`, say.

    The sum is the first result of the op, and its factor two arguments of it.
    """
    total = existing_result(node, 0)
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    places = names.index("total_scale_tensor"), names.index("total_scale")
    if total is None or any(node.args[place] is not None for place in places):
        return None
    (user, *others) = total.users
    unscaled = scaled_by(user)
    if others or unscaled is None or any(user is not total for user in node.users if user.users):
        return None
    context.mutations.forbid_between((node, user))
    scale, arguments = unscaled[1], list(node.args)
    arguments[places[0]], arguments[places[1]] = scale.tensor, scale.number
    fused = emit(
        context,
        cast(OpOverload, node.target),
        tuple(arguments),
        (fake_of(user), *fakes_of(context, node)[1:]),
        before=user,
        like=node,
    )
    user.replace_all_uses_with(result(context, fused, 0))
    erase(context, (node, total, user))
    return fused


RULE = Rule(
    name="rms_norm_add",
    before="x -> RMSNorm [-> * scale] -> + residual [-> * scale]",
    families="OLMo 2 and 3, EXAONE 4; the end of Gemma and GLM 4; HyperCLOVA's, Gemma 4's scales",
    apply=_apply,
)
