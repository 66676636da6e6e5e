"""x -> RMSNorm, in any spelling  =>  normfuse::rms_norm."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch.fx import Node
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from normfuse.ops import L2_NORM, RMS_NORM
from normfuse.ops.rounding import FLOATS, L2, RoundingPlan, is_exact_cast
from normfuse.patterns.decline import Decline
from normfuse.patterns.fakes import fake_empty, fake_empty_like
from normfuse.patterns.micro_ops import (
    Kind,
    Operand,
    dtype,
    fake_mode,
    fake_of,
    kind_of,
    same_layout,
    spelling,
    tensor,
)
from normfuse.patterns.rule import Context, Rule, emit, erase, result
from normfuse.patterns.scaling import (
    Scaling,
    read_scaling,
    uncast,
    users_of,
)
from normfuse.patterns.statistic import Candidate, Statistic, find_statistic, read_statistic
from normfuse.patterns.weight import path_between, read_weight


@dataclass(frozen=True)
class Norm:
    """One recognised norm: the operands of the op, and the nodes that it replaces.

    `last` is the node whose value becomes the op's result, after `views` are applied to it; `rstd`
    is the inverse root where something else reads it too. `copies` are nodes that eager made of the
    operands, and that others may still use.
    """

    x: Node
    weight: Node | None
    eps: Operand
    offset: float
    plan: RoundingPlan
    last: Node
    views: tuple[Node, ...]
    rstd: Node | None
    nodes: tuple[Node, ...]
    copies: tuple[Node, ...] = ()


def find_site(node: Node) -> Candidate | Node | None:
    """The RMS statistic that `node` is the root of: a candidate, one call of torch, or None."""
    if kind_of(node) in (Kind.RMS_NORM, Kind.VECTOR_NORM):
        return node if spelling(node) is not None else None
    return find_statistic(node)


def read_norm(site: Candidate | Node) -> Norm:
    """The norm at a site.

    Raises:
        Decline: it is none, or its roundings cannot be read.
    """
    if isinstance(site, Node):
        if kind_of(site) is Kind.VECTOR_NORM:
            raise Decline(
                "the length of a vector is one call of torch here, which is taken apart only after "
                "autograd: in training it stays as it is"
            )
        return _read_call(site)
    statistic = read_statistic(site)
    scaling = read_scaling(statistic)
    weight = scaling.weight
    return Norm(
        x=scaling.product.x,
        weight=weight.node if weight else None,
        eps=statistic.eps if scaling.product.bound is None else scaling.product.bound,
        offset=weight.offset if weight else 0.0,
        plan=scaling.plan(statistic),
        last=scaling.last,
        views=scaling.views,
        rstd=_escaping_rstd(statistic, scaling),
        nodes=(*statistic.nodes, *scaling.product.nodes, *scaling.nodes),
        copies=(*scaling.product.copies, *(weight.copies if weight else ())),
    )


def _escaping_rstd(statistic: Statistic, scaling: Scaling) -> Node | None:
    ours = {*statistic.nodes, *scaling.product.nodes}
    root = statistic.root
    if scaling.product.kind == "reciprocal_sqrt":
        if any(user not in ours for user in root.users):
            raise Decline("the square root of the variance has another user, which no op returns")
        root = scaling.product.nodes[0]
    if all(user in ours for user in root.users) and all(
        user in ours for node in scaling.product.nodes[:-1] for user in node.users
    ):
        return None
    if scaling.product.kind == "divide_by_sqrt":
        raise Decline("the square root of the variance has another user, which no op returns")
    if fake_of(root).dim() != fake_of(statistic.h).dim():
        raise Decline("the inverse root has another user and was reduced without keepdim")
    return root


def _read_call(node: Node) -> Norm:
    """`F.rms_norm(x, normalized_shape, weight, eps)`, which `torch.nn.RMSNorm` calls."""
    names = ("input", "normalized_shape", "weight", "eps")
    given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    x, shape = given["input"], given["normalized_shape"]
    assert isinstance(x, Node)
    if not isinstance(shape, (list, tuple)) or len(shape) != 1:
        raise Decline("the norm does not run over the last dimension alone")
    if dtype(x) not in FLOATS:
        raise Decline(f"the statistic is computed in {dtype(x)}, which no kernel has")
    weight = given.get("weight")
    assert weight is None or isinstance(weight, Node)
    if weight is not None and dtype(weight) not in FLOATS:
        raise Decline(f"the weight is {dtype(weight)}, which no rounding plan has")
    plan = _plan_of_call(node, x, weight)
    eps = cast("float | Node | None", given.get("eps"))
    norm = Norm(
        x=x,
        weight=weight,
        eps=torch.finfo(plan.compute).eps if eps is None else eps,
        offset=0.0,
        plan=plan,
        last=node,
        views=(),
        rstd=None,
        nodes=(node,),
    )
    return _with_casts(norm) if plan.out == dtype(x) else norm


def _with_casts(norm: Norm) -> Norm:
    """With the casts and the offset around a call: `F.rms_norm(x.float(), ..., w + 1).to(bf16)`."""
    x, plan = uncast(norm.x), norm.plan
    norm = replace(norm, x=x, copies=path_between(norm.x, x))
    weight = None if norm.weight is None else read_weight(norm.weight, fake_of(x).shape[-1])
    if weight is not None:
        plan = replace(plan, weight=weight.dtypes)
        copies = (*norm.copies, *weight.copies)
        norm = replace(norm, weight=weight.node, offset=weight.offset, copies=copies)
    cast_behind = _only_cast(norm.last)
    if cast_behind is not None and plan.out in (plan.compute, dtype(cast_behind)):
        plan = replace(plan, out=dtype(cast_behind))
        norm = replace(norm, last=cast_behind, nodes=(*norm.nodes, cast_behind))
    return replace(norm, plan=plan)


def _only_cast(node: Node) -> Node | None:
    """The cast that is all that becomes of a node."""
    users = users_of(node)
    if len(users) != 1 or kind_of(users[0]) is not Kind.CAST or dtype(users[0]) not in FLOATS:
        return None
    return users[0]


def _plan_of_call(node: Node, x: Node, weight: Node | None) -> RoundingPlan:
    """The result has the type of x, unless autocast has cast both operands to a wider one."""
    factor = None if weight is None else dtype(weight)
    out = dtype(node)
    if out == dtype(x):
        return RoundingPlan.once(out, factor)
    if out not in FLOATS or not all(is_exact_cast(t, out) for t in (dtype(x), factor or out)):
        raise Decline(f"a norm of {dtype(x)} gives {out}: its operands are rounded before it")
    return RoundingPlan.once(out, None if factor is None else out)


def rewrite(norm: Norm, context: Context) -> Node:
    """Replace the nodes of a norm by one op; returns the op's node."""
    eps_tensor = cast(Node, norm.eps) if tensor(norm.eps) is not None else None
    if isinstance(eps_tensor, Node) and fake_of(eps_tensor).device != fake_of(norm.x).device:
        raise Decline("eps is a tensor on another device than the activations")
    if isinstance(eps_tensor, Node) and fake_of(eps_tensor).requires_grad:
        raise Decline("eps is learned, and the op has no gradient for it")
    reads = [node for node in (norm.x, norm.weight, eps_tensor) if isinstance(node, Node)]
    for node in reads:
        if is_traceable_wrapper_subclass(fake_of(node)):
            kind = type(fake_of(node)).__name__
            raise Decline(f"an operand is a tensor subclass ({kind}), for which the op has no rule")
    context.mutations.forbid_between((*norm.nodes, *norm.copies))
    is_reordered = _is_reordered(norm)
    op = emit(
        context,
        L2_NORM if norm.plan.mean == L2 else RMS_NORM,
        _arguments(norm, eps_tensor, context),
        _fake_results(norm, is_reordered),
        before=_position(norm, reads),
        like=norm.last,
    )
    if norm.rstd is not None:
        norm.rstd.replace_all_uses_with(result(context, op, 1))
    value = result(context, op, 0)
    if is_reordered:
        value = _contiguous(value, norm.last, context)
    for view in norm.views:
        value = repeat_view(view, value, norm.last, context)
    value.meta[context.fake_key] = fake_of(norm.last)  # by its storage, writes to it are known
    norm.last.replace_all_uses_with(value)
    erase(context, norm.nodes)
    return op


def _arguments(norm: Norm, eps_tensor: Node | None, context: Context) -> tuple[Any, ...]:
    """What the op of a norm is called with, in schema order."""
    eps = 0.0 if eps_tensor is not None else norm.eps
    number = eps if isinstance(eps, Node) else float(eps)
    plan = context.plan(norm.plan)
    if norm.plan.mean == L2:
        return norm.x, eps_tensor, number, plan
    return norm.x, norm.weight, eps_tensor, number, norm.offset, plan


def _position(norm: Norm, reads: list[Node]) -> Node:
    if norm.rstd is None:
        return norm.last
    position = norm.rstd.next
    if any(not node < position for node in reads):
        raise Decline("the weight is computed after the first use of the inverse root")
    return position


def _fake_results(norm: Norm, is_reordered: bool) -> tuple[torch.Tensor, torch.Tensor]:
    x = fake_of(norm.x)
    y = _fake_in_the_order_of_x(norm) if norm.views or is_reordered else fake_of(norm.last)
    if norm.rstd is not None:
        return y, fake_of(norm.rstd)
    return y, fake_empty(x, (*x.shape[:-1], 1), norm.plan.compute)


def _fake_in_the_order_of_x(norm: Norm) -> torch.Tensor:
    return fake_empty_like(fake_of(norm.x), norm.plan.out)


def _is_reordered(norm: Norm) -> bool:
    """Whether eager lays its result out row by row, where the op keeps the order of axes of x.

    `F.rms_norm` of transposed heads does, and a `view` may follow that relies on it.
    """
    ours = _fake_in_the_order_of_x(norm)
    theirs = fake_of(norm.views[0].all_input_nodes[0] if norm.views else norm.last)
    if same_layout(theirs, ours):
        return False
    if not same_layout(theirs, torch.empty_like(theirs, memory_format=torch.contiguous_format)):
        raise Decline(
            f"the result would have strides {tuple(ours.stride())} instead of eager's "
            f"{tuple(theirs.stride())}"
        )
    return True


def _contiguous(value: Node, last: Node, context: Context) -> Node:
    with context.graph.inserting_before(last):
        copy = context.graph.call_function(
            torch.ops.aten.clone.default, (value,), {"memory_format": torch.contiguous_format}
        )
    copy.meta.update(value.meta)
    with fake_mode(value):
        copy.meta[context.fake_key] = fake_of(value).contiguous()
    return copy


def repeat_view(view: Node, value: Node, before: Node, context: Context) -> Node:
    """The same view of an op's result."""
    with context.graph.inserting_before(before):
        copy = context.graph.node_copy(view, lambda _: value)
    with fake_mode(value):
        copy.meta[context.fake_key] = fake_of(value).reshape(fake_of(view).shape)
    return copy


def _apply(node: Node, context: Context) -> Node | None:
    site = find_site(node)
    norm = None if site is None else read_norm(site)
    return None if norm is None or norm.plan.mean == L2 else rewrite(norm, context)


RULE = Rule(
    name="rms_norm",
    before="x -> RMSNorm",
    families="all, each with its own spelling and rounding; `F.rms_norm` and `nn.RMSNorm`",
    apply=_apply,
)
