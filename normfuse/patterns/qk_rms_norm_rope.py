"""x -> RMSNorm [-> heads] -> RoPE, for q, k or both  =>  normfuse::qk_rms_norm_rope.

The norm is one of each head or, in inference, one of all heads of a token before they are taken
apart. In training that one is left to `qk_rms_norm`, whose gradient has a kernel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node
from torch.fx.node import map_arg

from normfuse.ops import QK_RMS_NORM, QK_RMS_NORM_ROPE, RMS_NORM
from normfuse.ops.rotation import Rotation
from normfuse.patterns.columns import value_key
from normfuse.patterns.decline import Decline
from normfuse.patterns.fakes import fake_empty
from normfuse.patterns.micro_ops import fake_mode, fake_of, fake_value, same_sizes
from normfuse.patterns.rotary import (
    Rotary,
    insert,
    laid_out,
    negations,
    read_rotary,
    tables_of,
)
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

aten = torch.ops.aten

_TRANSPOSES: set[Any] = {"transpose", torch.transpose, aten.transpose.int}
_PERMUTES: set[Any] = {"permute", torch.permute, aten.permute.default}
_HEADS: set[Any] = {
    *_TRANSPOSES,
    *_PERMUTES,
    *("view", "reshape", "unflatten", torch.reshape, aten.view.default, aten.reshape.default),
    aten.alias.default,  # of all columns, where only some might turn
}


@dataclass(frozen=True)
class _Turn:
    """What becomes of one normalised value: `views` lead to the heads that turn.

    Attributes:
        value: the normalised value.
        copies: a copy of it before the views.
        views: each keeps the last axis, unless the first one takes apart what is normalised.
        axis: that of the heads whose norm is one, counted from the end; None if each has its own.
        rotary: how they turn.
    """

    value: Node
    copies: tuple[Node, ...]
    views: tuple[Node, ...]
    axis: int | None
    rotary: Rotary

    @property
    def last(self) -> Node:
        return self.rotary.last

    @property
    def nodes(self) -> tuple[Node, ...]:
        return (*self.copies, *self.views, *self.rotary.nodes)


def _apply(node: Node, context: Context) -> Node | None:
    if node.target in (RMS_NORM, QK_RMS_NORM):
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
    """The norms of an op with the rotary embeddings behind them."""
    part = Part.of(node)
    if part is None or any(existing_result(node, part.num + i) for i in range(part.num)):
        return None
    if any(fake_of(weight).dim() != 1 for weight in part.weights):
        return None  # it says which axis is that of the heads, and the views would move it
    ys = [existing_result(node, index) for index in range(part.num)]
    turns = [
        None if y is None else _turn_of(y, context, may_join=weight is not None)
        for y, (_, weight) in zip(ys, part.norms, strict=True)
    ]
    found = [turn for turn in turns if turn is not None]
    if not found or not _turn_alike(found):
        return None
    place = min(turn.last for turn in found)
    others = [y for y, turn in zip(ys, turns, strict=True) if turn is None and y is not None]
    if any(user < place for y in others for user in y.users):
        return None
    for one in found:
        context.mutations.forbid_between((node, *one.nodes, *negations(one.rotary)))
    fused = _emit_turned(part, turns, place, context)
    for index, (y, turn) in enumerate(zip(ys, turns, strict=True)):
        old = y if turn is None else turn.last
        if old is not None:
            old.replace_all_uses_with(result(context, fused, index))
    erase(context, [node, *filter(None, ys), *(one for turn in found for one in turn.nodes)])
    return fused


def _emit_turned(part: Part, turns: list[_Turn | None], place: Node, context: Context) -> Node:
    """The op, at the first of the values that have turned."""
    first = next(turn for turn in turns if turn is not None and turn.last is place)
    rotations = ["none" if turn is None else str(_rotation(turn)) for turn in turns]
    tables = tables_of(first.rotary, context)
    norms = [_viewed(*one, place, context) for one in zip(part.norms, turns, strict=True)]
    weights = [weight for _, weight in norms if weight is not None]
    known = fakes_of(context, part.node)
    fakes: list[torch.Tensor] = []
    for y, turn in zip(known[: part.num], turns, strict=True):
        fakes.append(y if turn is None else fake_of(turn.last))
    for (x, _), turn, rstd in zip(norms, turns, known[part.num :], strict=True):
        shape = [*fake_of(x).shape[:-1], 1]
        if turn is not None and turn.axis is not None:
            shape[turn.axis] = 1
        fakes.append(fake_empty(rstd, shape, rstd.dtype))
    numbers = part.eps, part.offsets, part.plans, rotations
    arguments = ([x for x, _ in norms], weights, *tables, *numbers)
    return emit(context, QK_RMS_NORM_ROPE, arguments, fakes, before=place, like=part.node)


def _turn_of(y: Node, context: Context, *, may_join: bool) -> _Turn | None:
    """How a normalised value turns; None if it does not, or in a way that no op has.

    `may_join`: whether one norm may be that of all heads, as the shape of a weight says it.
    """
    copies = _copies(y)
    may_split = may_join and not copies and context.is_after_autograd
    views, axis = _views_to_heads(y, may_split=may_split)
    rotary = read_rotary((y, *copies, *views)[-1])
    if rotary is None:
        return None
    table = fake_of(rotary.cos.node)
    if axis is not None and table.dim() >= -axis and table.shape[axis] != 1:
        return None
    return _Turn(y, copies, tuple(views), axis, rotary)


def _turn_alike(turns: list[_Turn]) -> bool:
    """Whether all turn by the same tables."""
    rotaries = [turn.rotary for turn in turns]
    return all(
        value_key(table.node) == value_key(first.node)
        and (table.is_negated, table.part) == (first.is_negated, first.part)
        for rotary in rotaries[1:]
        for table, first in ((rotary.cos, rotaries[0].cos), (rotary.sin, rotaries[0].sin))
    )


def _rotation(turn: _Turn) -> Rotation:
    return laid_out(turn.rotary, fake_of((turn.value, *turn.views)[-1]))


def _viewed(
    norm: tuple[Node, Node | None], turn: _Turn | None, before: Node, context: Context
) -> tuple[Node, Node | None]:
    """The input of a norm as the heads that turn, and its weight as it fits them."""
    x, weight = norm
    for view in turn.views if turn is not None else ():
        x = _repeated(view, x, before, context)
    if turn is None or turn.axis is None:
        return x, weight
    shape = fake_of(x).shape
    sizes = [shape[turn.axis], *[1] * (-turn.axis - 2), shape[-1]]
    assert weight is not None
    return x, insert(aten.view.default, (weight, sizes), before, context)


def _copies(y: Node) -> tuple[Node, ...]:
    """The copy by which a call of `F.rms_norm` lays its result out row by row, as eager does."""
    users = tuple(y.users)
    return users if len(users) == 1 and users[0].target is torch.ops.aten.clone.default else ()


def _views_to_heads(y: Node, *, may_split: bool) -> tuple[list[Node], int | None]:
    """The views from the normalised value to the heads that turn.

    They keep the last axis; where the first one takes it apart into heads, which share a norm, the
    others only move axes, and the axis of the heads comes with them.
    """
    views: list[Node] = []
    axis = None
    while len(y.users) == 1:
        (user,) = y.users
        if user.target not in _HEADS or any(isinstance(arg, Node) for arg in user.args[1:]):
            break
        before, after = fake_of(y), fake_of(user)
        if axis is None and may_split and not views and _is_split(before, after):
            axis = -2
        elif not _keeps_columns(before, after):
            break
        elif axis is not None:
            moved = _moved(axis, user, after.dim())
            if moved is None:
                break
            axis = moved
        views.append(user)
        y = user
    return views, axis


def _is_split(before: torch.Tensor, after: torch.Tensor) -> bool:
    """Whether the last axis is taken apart into heads, all other axes being as they were."""
    *rows, width = before.shape
    is_known = isinstance(width, int) and all(isinstance(size, int) for size in after.shape[-2:])
    return (
        is_known
        and same_sizes(after.shape[:-2], rows)
        and after.shape[-2] * after.shape[-1] == width
        and after.shape[-2] > 1
    )


def _keeps_columns(before: torch.Tensor, after: torch.Tensor) -> bool:
    if not isinstance(before.shape[-1], int) or after.shape[-1] != before.shape[-1]:
        return False
    return after.stride(-1) == before.stride(-1)


def _moved(axis: int, view: Node, rank: int) -> int | None:
    """Where an axis goes, both counted from the end; None if the view does more than move axes."""
    order = list(range(rank))
    arguments: Any = view.args[1:]
    if view.target in _TRANSPOSES:
        one, other = arguments
        order[one], order[other] = order[other], order[one]
    elif view.target in _PERMUTES:
        order = list(arguments[0] if isinstance(arguments[0], (list, tuple)) else arguments)
    elif view.target is not aten.alias.default:
        return None
    return [dim % rank for dim in order].index(axis % rank) - rank


def _repeated(view: Node, x: Node, before: Node, context: Context) -> Node:
    """The same view of the norm's input; what it takes beside a value are numbers."""
    viewed = view.args[0]
    with context.graph.inserting_before(before):
        copy = context.graph.node_copy(view, lambda one: x if one is viewed else one)
    try:
        with fake_mode(x):
            args = (fake_of(x), *map_arg(view.args[1:], fake_value))
            kwargs, target = view.kwargs, view.target
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
    before="q, k [, v] -> RMSNorm of a head or all -> RoPE (half, interleaved, complex, partial)",
    families="Qwen 3, Gemma 3 and 4, GLM 4 MoE, EXAONE 4, LFM 2, dots.llm1, OLMo 2, MiniMax M2",
    apply=_apply,
)
