"""x -> several RMSNorms, each with a weight of its own  =>  normfuse::rms_norms."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch.fx import Node

from normfuse.ops import RMS_NORM, RMS_NORMS, RoundingPlan
from normfuse.ops.rms_norms import MAX_NORMS
from normfuse.patterns.fakes import fake_empty, fake_empty_like
from normfuse.patterns.micro_ops import (
    Kind,
    fake_of,
    keeps_rows,
    same_sizes,
    source_of,
)
from normfuse.patterns.residual_sum import scaled_by
from normfuse.patterns.rms_norm import repeat_view
from normfuse.patterns.rule import (
    Context,
    Rule,
    emit,
    erase,
    existing_result,
    insertion_point,
    is_pure,
    result,
)


@dataclass(frozen=True)
class _Norm:
    """One of the norms of x: it reads x through `views`, and `value` is its result times `scale`.

    Gemma 4's router reads the residual without its batch dimension.
    """

    node: Node
    views: tuple[Node, ...]
    value: Node
    scale: float

    @property
    def weight(self) -> Node | None:
        weight = self.node.args[1]
        assert weight is None or isinstance(weight, Node)
        return weight

    @property
    def plan(self) -> str:
        return str(self.node.args[5])


def _apply(node: Node, context: Context) -> Node | None:
    if node.target is not RMS_NORM:
        return None
    x, norms = _norms_from(node)
    if len(norms) < 2:
        return None
    context.mutations.forbid_between([part for n in norms for part in (n.node, *n.views)])
    weights = [norm.weight for norm in norms if norm.weight is not None]
    users = [user for norm in norms for user in norm.value.users]
    point = insertion_point(weights, node, users)
    fused = emit(
        context,
        RMS_NORMS,
        (
            x,
            weights,
            node.args[3],
            [norm.node.args[4] for norm in norms],
            [norm.scale for norm in norms],
            [norm.plan for norm in norms],
        ),
        _fake_results(x, norms),
        before=point,
        like=node,
    )
    for index, norm in enumerate(norms):
        value = result(context, fused, index)
        for view in norm.views:
            value = repeat_view(view, value, max(norm.value, point), context)
        norm.value.replace_all_uses_with(value)
    erase(context, [part for norm in norms for part in (norm.node, norm.value, *norm.views)])
    return fused


def _norms_from(node: Node) -> tuple[Node, list[_Norm]]:
    """The value that a norm reads, and the norms of it that can share its statistic."""
    x = node.args[0]
    assert isinstance(x, Node)
    found = [norm for norm in _norms_of(_behind_views(x), ()) if not norm.node < node]
    norms = [norm for norm in sorted(found, key=_position) if _shares_statistic(norm, node)]
    norms = norms[:MAX_NORMS]
    if not norms or norms[0].node is not node:
        return x, []
    if all(norm.views == norms[0].views for norm in norms):
        return x, [replace(norm, views=()) for norm in norms]
    return _behind_views(x), norms


def _position(norm: _Norm) -> Node:
    return norm.node


def _behind_views(x: Node) -> Node:
    """The value of which `x` is another view of the same rows."""
    while (source := source_of(x, Kind.VIEW)) is not None and _keeps_layout(x, source):
        x = source
    return x


def _keeps_layout(view: Node, source: Node) -> bool:
    """A view of the same rows, of a contiguous value.

    The result of the op is contiguous, too, so that a view of it lies where eager's result does.
    """
    fake = fake_of(source)
    dense = fake_empty(fake, fake.shape, fake.dtype)
    return keeps_rows(view, source) and same_sizes(fake.stride(), dense.stride())


def _norms_of(value: Node, views: tuple[Node, ...]) -> Iterator[_Norm]:
    for user in value.users:
        if user.target is RMS_NORM and user.args[0] is value:
            y = existing_result(user, 0)
            if y is not None and existing_result(user, 1) is None:
                yield _Norm(user, views, *_scaled(y))
        elif source_of(user, Kind.VIEW) is value and _keeps_layout(user, value):
            yield from _norms_of(user, (*views, user))


def _scaled(y: Node) -> tuple[Node, float]:
    """A result times the one number that multiplies it, where nothing else reads it."""
    if len(y.users) == 1:
        (user,) = y.users
        unscaled = scaled_by(user)
        if unscaled is not None and is_pure(user) and isinstance(unscaled[1].number, float):
            return user, unscaled[1].number
    return y, 1.0


def _shares_statistic(norm: _Norm, first: Node) -> bool:
    eps_tensor, eps = norm.node.args[2:4]
    statistics = [RoundingPlan.parse(str(one.args[5])).statistic for one in (norm.node, first)]
    return eps_tensor is None and eps == first.args[3] and statistics[0] == statistics[1]


def _fake_results(x: Node, norms: list[_Norm]) -> list[torch.Tensor]:
    fake, plans = fake_of(x), [RoundingPlan.parse(norm.plan) for norm in norms]
    ys = [fake_empty_like(fake, plan.out) for plan in plans]
    return [*ys, fake_empty(fake, (*fake.shape[:-1], 1), plans[0].compute)]


RULE = Rule(
    name="rms_norms",
    before="x -> RMSNorm [-> * number], and x -> RMSNorm [-> * number], up to four",
    families="Gemma 4's dense branch, router and experts; its keys that serve as values",
    apply=_apply,
)
