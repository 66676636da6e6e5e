"""Casts to the type of another tensor, written with that type: `w.type_as(x)` is `w.to(x.dtype)`.

A tensor that lends its type is no operand, and yet has one user more. OLMo's authors cast a weight
to the type of the value that it then multiplies.
"""

from __future__ import annotations

from torch.fx import Graph
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from normfuse.patterns.micro_ops import tensor

_CASTS = ("type_as", "to")


def write_types(graph: Graph) -> None:
    """Replace every such cast; one that moves to another device stays."""
    for node in list(graph.nodes):
        if node.op != "call_method" or node.target not in _CASTS or node.kwargs:
            continue
        if len(node.args) != 2:
            continue
        source, template = map(tensor, node.args)
        if source is None or template is None or source.device != template.device:
            continue
        if not any(is_traceable_wrapper_subclass(value) for value in (source, template)):
            node.target, node.args = "to", (node.args[0], template.dtype)
