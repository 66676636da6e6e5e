"""Tables of angles that a backward computes anew, as it does without us.

Autograd's partitioner computes again what a pointwise backward reads, and keeps what anything else
reads: to it, our gradients are something else, so that cos and sin would be kept from the forward
on. Behind a copy they are read by something pointwise. Inductor drops the copy after the partition,
and before it, too, so that this is the last that is done to a joint graph.
"""

from __future__ import annotations

import torch
from torch.fx import Graph, Node

from normfuse.ops.qk_rms_norm_rope_backward import QK_RMS_NORM_ROPE_BACKWARD
from normfuse.patterns.fakes import fake_like

_TABLES = (4, 5)  # which arguments of the op


def recompute_tables(graph: Graph) -> None:
    """Put a copy between each computed table of a joint graph and the gradients that read it."""
    copies: dict[Node, Node] = {}
    for op in graph.find_nodes(op="call_function", target=QK_RMS_NORM_ROPE_BACKWARD):
        for index in _TABLES:
            table = op.args[index]
            if isinstance(table, Node) and table.op == "call_function":
                if table not in copies:
                    copies[table] = _copied(table, op)
                op.update_arg(index, copies[table])


def _copied(table: Node, place: Node) -> Node:
    with place.graph.inserting_before(place):
        copy = place.graph.call_function(torch.ops.aten.clone.default, (table,))
    copy.meta["val"] = fake_like(table.meta["val"])
    copy.meta["partitioner_tag"] = "must_be_in_backward"
    return copy
