"""Tables of angles that a backward computes anew, as it does without us.

Autograd's partitioner computes again what a pointwise backward reads, and keeps what anything else
reads: to it, our gradients are something else, so that cos and sin would be kept from the forward
on. So the way from what they are made from is put into the backward once more. It begins with
copies, or else it would be taken for that of the forward; Inductor drops them after the partition,
and before it, too, so that this is the last that is done to a joint graph.
"""

from __future__ import annotations

from math import prod

import torch
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from normfuse.ops.qk_rms_norm_rope_backward import QK_RMS_NORM_ROPE_BACKWARD
from normfuse.passes import inductor
from normfuse.passes.kinds import is_pointwise, is_view

_TABLES = (4, 5)  # which arguments of the op
_CAT = torch.ops.aten.cat.default
MAX_STEPS = 64  # between a table and what it is made from


def recompute_tables(graph: Graph) -> None:
    """Compute each table of a joint graph anew for the gradients that read it."""
    anew: dict[Node, Node] = {}
    for op in graph.find_nodes(op="call_function", target=QK_RMS_NORM_ROPE_BACKWARD):
        for index in _TABLES:
            table = op.args[index]
            if isinstance(table, Node) and table.op == "call_function":
                if table not in anew:
                    _compute(table, op, anew)
                op.update_arg(index, anew[table])


def _compute(table: Node, place: Node, anew: dict[Node, Node]) -> None:
    """Add the table, and what it takes, to the nodes that stand in front of `place`."""
    steps = _steps(table)
    with place.graph.inserting_before(place):
        for source in _sources(steps) if steps else [table]:
            if source not in anew:
                anew[source] = place.graph.call_function(torch.ops.aten.clone.default, (source,))
                _describe(anew[source])
        for step in steps:
            if step not in anew:
                anew[step] = place.graph.node_copy(step, lambda node: anew.get(node, node))
                _describe(anew[step])


def _steps(table: Node) -> list[Node]:
    """What Inductor fuses into the table, in order; none where the table is smaller to keep."""
    steps: dict[Node, None] = {}
    pending = [table]
    while pending and len(steps) <= MAX_STEPS:
        node = pending.pop()
        if node not in steps and (is_pointwise(node) or is_view(node) or node.target is _CAT):
            steps[node] = None
            pending += node.all_input_nodes
    kept = sum(map(_num_bytes, _sources(list(steps))))
    return [] if pending or kept > _num_bytes(table) else sorted(steps)


def _sources(steps: list[Node]) -> list[Node]:
    """The tensors that the steps begin with."""
    inside = set(steps)
    found = dict.fromkeys(one for step in steps for one in step.all_input_nodes)
    return [one for one in found if one not in inside and _is_tensor(one)]


def _is_tensor(node: Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)


def _num_bytes(node: Node) -> int:
    """Of a tensor that would be kept, expanded axes once; an input is there in any case."""
    if node.op == "placeholder":
        return 0
    value = node.meta["val"]
    axes = zip(map(inductor.hint, value.shape), map(inductor.hint, value.stride()), strict=True)
    return int(prod(size for size, stride in axes if stride) * value.dtype.itemsize)


def _describe(node: Node) -> None:
    """What tracing would have recorded, and where the partitioner shall leave it."""
    arguments = map_arg((node.args, node.kwargs), lambda one: one.meta["val"])
    node.meta["val"] = node.target(*arguments[0], **arguments[1])  # type: ignore[operator]
    node.meta["partitioner_tag"] = "must_be_in_backward"
