"""Calls between a norm and a sum that give back what they are given: dropout that is off, views.

Elsewhere they stay: Inductor sees them without us, too, and makes something of them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from normfuse.patterns.micro_ops import (
    Kind,
    fake_of,
    kind_of,
    same_layout,
    same_sizes,
    source_of,
)
from normfuse.patterns.mutation import written_by

_DROPOUTS = {torch.nn.functional.dropout, torch.dropout, torch.ops.aten.dropout.default}


def skip_to_sum(value: Node) -> None:
    """Let the sum or scale that reads a norm's result read it past calls that change nothing."""
    skipped: list[Node] = []
    last = value
    while len(last.users) == 1 and _gives_back(next(iter(last.users)), last):
        last = next(iter(last.users))
        skipped.append(last)
    if skipped and all(_is_sum_or_scale(user) for user in last.users):
        last.replace_all_uses_with(value)
        for node in reversed(skipped):
            node.graph.erase_node(node)


def _is_sum_or_scale(node: Node) -> bool:
    """In place, it would write to the norm's result instead."""
    return kind_of(node) in (Kind.ADD, Kind.MUL) and not written_by(node)


def _gives_back(node: Node, value: Node) -> bool:
    """Whether a reader of `value` returns it as it is."""
    if node.target in _DROPOUTS:
        return _is_off(*node.args[1:], **node.kwargs)
    if source_of(node, Kind.VIEW) is not value:
        return False
    before, after = fake_of(value), fake_of(node)
    is_same = before.dtype == after.dtype and same_sizes(before.shape, after.shape)
    return is_same and same_layout(before, after)


def _is_off(p: Any = 0.5, training: Any = True, inplace: Any = False, **others: Any) -> bool:
    """Whether torch returns the input itself: outside of training, or if nothing is dropped."""
    training = others.get("train", training)
    return training is False or (isinstance(p, (int, float)) and p == 0)
