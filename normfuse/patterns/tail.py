"""Reads on from a recognised norm: the weight of its groups, a gate, casts and reshapes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch.fx import Node

from normfuse.ops.rounding import FLOATS, RoundingPlan, is_exact_cast
from normfuse.patterns.gate import Gate, read_gate, source_of_reshape
from normfuse.patterns.micro_ops import (
    Kind,
    MicroOp,
    dtype,
    fake_of,
    micro_op,
    pairs,
    same_sizes,
    source_of,
    tensor,
    width_of,
)
from normfuse.patterns.rule import existing_result
from normfuse.patterns.scaling import check_promotion, rounds_once
from normfuse.patterns.weight import read_weight


@dataclass(frozen=True)
class Tail:
    """A norm and what follows it, down to the node `last`; `nodes` are those behind the norm."""

    plan: RoundingPlan
    weight: Node | None
    offset: float
    gate: Gate | None
    last: Node
    nodes: tuple[Node, ...]


def tails(norm: Node, sources: tuple[Node, ...], *, takes_gate: bool) -> Iterator[Tail]:
    """Every tail of an `rms_norm` op, each one node longer than the one before.

    Args:
        norm: the op's node.
        sources: nodes of which x was made by reshapes; the weight spans a row of one of them.
        takes_gate: whether a tail may include a gate.
    """
    y = existing_result(norm, 0)
    if y is None:
        return
    weight, offset, plan = cast("tuple[Node | None, float, str]", (*norm.args[1:2], *norm.args[4:]))
    widths = {width for source in sources if (width := width_of(source)) is not None}
    tail: Tail | None = Tail(RoundingPlan.parse(plan), weight, offset, None, y, (y,))
    while tail is not None:
        yield tail
        tail = _extended(tail, widths, takes_gate)


def _extended(tail: Tail, widths: set[int], takes_gate: bool) -> Tail | None:
    if len(tail.last.users) != 1:
        return None
    (user,) = tail.last.users
    op = micro_op(user)
    if op is None or tensor(user) is None or dtype(user) not in FLOATS:
        return None
    if op.kind is Kind.VIEW and source_of_reshape(user) is not None:
        return replace(tail, last=user, nodes=(*tail.nodes, user))
    if op.kind is Kind.CAST:
        return _with_cast(tail, user)
    if op.kind is not Kind.MUL or tail.gate is not None:
        return None
    gate = read_gate(user) if takes_gate else None
    if gate is not None and gate.value is tail.last:
        return replace(tail, gate=gate, last=user, nodes=(*tail.nodes, user))
    return _with_weight(tail, user, op, widths)


def _with_cast(tail: Tail, cast: Node) -> Tail | None:
    longer = replace(tail, last=cast, nodes=(*tail.nodes, cast))
    plan, target = tail.plan, dtype(cast)
    if target == dtype(tail.last):
        return longer
    if tail.gate is not None:
        return longer if dtype(tail.last) == dtype(tail.gate.product) else None
    if plan.weight is None:
        is_readable = rounds_once(plan.unit, target)
    else:
        is_readable = plan.out == torch.promote_types(plan.unit[-1], plan.weight[1])
    return replace(longer, plan=plan.with_out(target)) if is_readable else None


def _with_weight(tail: Tail, product: Node, op: MicroOp, widths: set[int]) -> Tail | None:
    """A weight that spans all groups: it multiplies after the groups are joined, or as (G, N/G)."""
    factor = next(b for a, b in pairs(op) if a is tail.last)
    if tail.weight is not None or not isinstance(factor, Node) or tensor(factor) is None:
        return None
    for width in widths:
        weight = read_weight(factor, width) if _is_row(factor, product, width) else None
        if weight is None:
            continue
        check_promotion(product, tail.last, factor)
        return replace(
            tail,
            plan=replace(tail.plan, weight=weight.dtypes, out=dtype(product)),
            weight=weight.node,
            offset=weight.offset,
            last=product,
            nodes=(*tail.nodes, *weight.copies, product),
        )
    return None


def _is_row(factor: Node, product: Node, width: int) -> bool:
    """Whether a factor repeats itself every `width` elements of the product."""
    shape = tuple(fake_of(factor).shape)
    while shape and same_sizes(shape[:1], (1,)):
        shape = shape[1:]
    return same_sizes((fake_of(factor).numel(),), (width,)) and same_sizes(
        shape, fake_of(product).shape[-len(shape) :]
    )


def same_values(x: Node) -> Iterator[Node]:
    """`x`, and what it was made of by casts that round nothing and by views that copy nothing."""
    node: Node | None = x
    while node is not None:
        yield node
        cast, view = source_of(node, Kind.CAST), source_of_reshape(node)
        is_exact = cast is not None and is_exact_cast(dtype(cast), dtype(node))
        is_alias = view is not None and _storage(view) == _storage(node)
        node = cast if is_exact else view if is_alias else None


def _storage(node: Node) -> int:
    storage: int = fake_of(node).untyped_storage()._cdata
    return storage
