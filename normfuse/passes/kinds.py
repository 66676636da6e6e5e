"""What an operation is to Inductor's fusion: pointwise, a view of memory, or a border."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch.fx import Node

# Inductor fuses these, too, but torch does not tag them as pointwise.
_ALSO_POINTWISE = ("cat", "constant_pad_nd", "_to_copy")


def is_pointwise(node: Node) -> bool:
    """Whether Inductor fuses a node with its neighbours, element by element."""
    return node.op == "call_function" and _kind(node.target) == "pointwise" and _is_tensor(node)


def is_view(node: Node) -> bool:
    """Whether a node shows the memory of another."""
    return node.op == "call_function" and _kind(node.target) == "view" and _is_tensor(node)


def is_random(node: Node) -> bool:
    """Whether the same operation on the same operands may have another result."""
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def _is_tensor(node: Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)


@cache
def _kind(target: Any) -> str | None:
    """What an operation is to Inductor's fusion: "pointwise", "view", or a border."""
    if not isinstance(target, torch._ops.OpOverload) or target._schema.is_mutable:
        return None
    if target.is_view:
        return "view"
    fuses = torch.Tag.pointwise in target.tags or op_name(target) in _ALSO_POINTWISE
    return "pointwise" if fuses else None


def op_name(target: Any) -> str:
    return str(target._schema.name).split("::")[1]
