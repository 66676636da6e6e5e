"""Sums and products in place on a value that nothing else sees, written out of place.

Gemma 4 scales the sum at the end of a layer by `*=`. What comes after autograd is the same either
way; the graph of a training step is read before it, where a rule would meet a write.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from typing import Any

import torch
from torch.autograd import grad_mode
from torch.fx import Graph, Node
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from normfuse.patterns.fakes import fake_empty_like
from normfuse.patterns.micro_ops import fake_of, micro_op, same_layout, tensor
from normfuse.patterns.mutation import UNTOLD, storages_of

_OUT_OF_PLACE: dict[Any, Any] = {
    **dict.fromkeys((operator.iadd, "add_"), torch.add),
    **dict.fromkeys((operator.imul, "mul_"), torch.mul),
}


def write_out_of_place(graph: Graph) -> None:
    """Replace every such write; the fake of its result keeps the memory, for whatever follows."""
    writes = _writes(graph)
    if not writes:
        return
    holders: dict[int, list[Node]] = defaultdict(list)
    for node in graph.nodes:
        for memory in storages_of([node]):
            holders[memory].append(node)
    for write in writes:
        if _is_plain(write) and _is_private(write, holders):
            with graph.inserting_before(write):
                value = graph.call_function(_OUT_OF_PLACE[write.target], write.args)
            value.meta.update(write.meta)
            for same in (holders[memory] for memory in storages_of([write])):
                same[same.index(write)] = value
            write.replace_all_uses_with(value)
            graph.erase_node(write)


def _writes(graph: Graph) -> list[Node]:
    """Those outside of `torch.no_grad()`.

    Within it a write leaves the history of what it changes, and a new value would have none.
    """
    writes: list[Node] = []
    is_on = True
    for node in graph.nodes:
        if node.target is torch._C._set_grad_enabled:
            is_on = bool(node.args[0])
        elif node.target is grad_mode._enter_inference_mode:
            return []
        elif is_on and node.target in _OUT_OF_PLACE:
            writes.append(node)
    return writes


def _is_plain(write: Node) -> bool:
    """Whether its result is that of the operation out of place, also in type and layout."""
    if micro_op(write) is None or write.kwargs or len(write.args) != 2 or tensor(write) is None:
        return False
    operands: list[Any] = [_value(operand) for operand in write.args]
    if any(value is None or is_traceable_wrapper_subclass(value) for value in operands):
        return False
    fake = fake_of(write)
    is_dense = same_layout(fake, fake_empty_like(fake, fake.dtype))
    return is_dense and fake.dtype == torch.result_type(*operands)


def _value(operand: Any) -> Any:
    return tensor(operand) if isinstance(operand, Node) else operand


def _is_private(write: Node, holders: dict[int, list[Node]]) -> bool:
    """Whether the memory is new in the graph, and is read after the write by the write alone."""
    written = write.args[0]
    if not isinstance(written, Node) or written.op not in ("call_function", "call_method"):
        return False
    memories = storages_of([write])
    if UNTOLD in holders:
        return False
    earlier = [node for memory in memories for node in holders[memory] if node < write]
    is_new = bool(earlier) and earlier[0] is written
    return is_new and not any(write < user for node in earlier for user in node.users)
