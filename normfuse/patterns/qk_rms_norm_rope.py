"""x -> RMSNorm [-> heads] -> RoPE, for q, k or both  =>  normfuse::qk_rms_norm_rope."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from normfuse.ops import QK_RMS_NORM_ROPE, RMS_NORM
from normfuse.patterns.decline import Decline
from normfuse.patterns.fakes import fake_empty
from normfuse.patterns.micro_ops import fake_mode, fake_of
from normfuse.patterns.rotary import laid_out, negations, read_rotary, tables_of
from normfuse.patterns.rule import (
    Context,
    Rule,
    emit,
    erase,
    existing_result,
    fakes_of,
    result,
)
from normfuse.patterns.side_by_side import Part, join, previous_part, stand_side_by_side

_HEADS: set[Any] = {
    *("transpose", "permute", "view", "reshape", "unflatten", torch.transpose, torch.permute),
    *(torch.reshape, torch.ops.aten.transpose.int, torch.ops.aten.permute.default),
    *(torch.ops.aten.view.default, torch.ops.aten.reshape.default),
}


def _apply(node: Node, context: Context) -> Node | None:
    if node.target is RMS_NORM:
        turned = _turn(node, context)
        if turned is not None:
            return turned
    right = Part.of(node)
    left = previous_part(node) if right is not None else None
    if left is None or right is None or not (left.tables or right.tables):
        return None
    # The norm of k stands before the embedding of q; it turns first.
    turned = _turn(left.node, context) if left.node.target is RMS_NORM else None
    if turned is not None or not stand_side_by_side(left, right):
        return turned
    return join(left, right, context)


def _turn(node: Node, context: Context) -> Node | None:
    """One norm with the rotary embedding behind it."""
    x, weight, eps_tensor, eps, offset, plan = node.args
    y = existing_result(node, 0)
    if y is None or eps_tensor is not None or isinstance(eps, Node) or existing_result(node, 1):
        return None
    assert isinstance(x, Node)
    copies = _copies(y)
    heads = _views_to_heads(y)
    rotary = read_rotary((y, *copies, *heads)[-1])
    if rotary is None:
        return None
    context.mutations.forbid_between((node, *copies, *heads, *rotary.nodes, *negations(rotary)))
    rotation = laid_out(rotary, fake_of(heads[-1] if heads else y))
    tables = tables_of(rotary, context)
    for view in heads:
        x = _repeated(view, x, rotary.last, context)
    rstd = fakes_of(context, node)[1]
    rstd = fake_empty(rstd, (*fake_of(x).shape[:-1], 1), rstd.dtype)
    weights = [] if weight is None else [weight]
    fused = emit(
        context,
        QK_RMS_NORM_ROPE,
        ([x], weights, *tables, [eps], [offset], [plan], [str(rotation)]),
        (fake_of(rotary.last), rstd),
        before=rotary.last,
        like=node,
    )
    rotary.last.replace_all_uses_with(result(context, fused, 0))
    erase(context, (node, y, *copies, *heads, *rotary.nodes))
    return fused


def _copies(y: Node) -> tuple[Node, ...]:
    """The copy by which a call of `F.rms_norm` lays its result out row by row, as eager does."""
    users = tuple(y.users)
    return users if len(users) == 1 and users[0].target is torch.ops.aten.clone.default else ()


def _views_to_heads(y: Node) -> list[Node]:
    """The views from the normalised value to the heads that turn; they keep the last axis."""
    views: list[Node] = []
    while len(y.users) == 1:
        (user,) = y.users
        if user.target not in _HEADS or any(isinstance(arg, Node) for arg in user.args[1:]):
            break
        before, after = fake_of(y), fake_of(user)
        if not isinstance(before.shape[-1], int) or after.shape[-1] != before.shape[-1]:
            break
        if after.stride(-1) != before.stride(-1):
            break
        views.append(user)
        y = user
    return views


def _repeated(view: Node, x: Node, before: Node, context: Context) -> Node:
    """The same view of the norm's input."""
    with context.graph.inserting_before(before):
        copy = context.graph.node_copy(view, lambda _: x)
    try:
        with fake_mode(x):
            args, kwargs = (fake_of(x), *view.args[1:]), view.kwargs
            target = view.target
            fake = (
                getattr(args[0], target)(*args[1:], **kwargs)
                if isinstance(target, str)
                else target(*args, **kwargs)
            )
    except (RuntimeError, ValueError):
        context.graph.erase_node(copy)
        raise Decline("the input of the norm cannot be viewed as the heads that turn") from None
    copy.meta[context.fake_key] = fake
    return copy


RULE = Rule(
    name="qk_rms_norm_rope",
    before="q, k -> RMSNorm of each head -> RoPE (half, interleaved, complex, partial) [, v]",
    families="Qwen 3, Gemma 3 and 4, GLM 4 MoE, EXAONE 4, LFM 2, dots.llm1",
    apply=_apply,
)
