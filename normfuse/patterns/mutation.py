"""In-place writes in a graph, so that no rewrite reads a value before or after someone changed it.

Dynamo's graphs keep `h.mul_(r)` and `x += y` as they were written. A rewrite replaces several reads
at several places by one; that is sound only if nothing writes to the values in between. Aliases are
found through the storage that fake tensors share, also below the wrappers of torch.vmap and
torch.func.grad. Where a storage cannot be told, it may be any.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Iterable
from functools import cache
from typing import Any

import torch
from torch._C import _functorch
from torch.fx import Graph, Node

from normfuse.patterns.decline import Decline
from normfuse.patterns.micro_ops import tensor

_IN_PLACE_OPERATORS = {
    getattr(operator, name)
    for name in (
        "iadd",
        "isub",
        "imul",
        "itruediv",
        "ifloordiv",
        "ipow",
        "imod",
        "iand",
        "ior",
        "ixor",
    )
} | {operator.setitem}


class Mutations:
    """The in-place writes of one graph; a functional graph has none, and every check is free."""

    def __init__(self, graph: Graph) -> None:
        self._writes = [
            (node, frozenset(storages_of(written_by(node))))
            for node in graph.nodes
            if written_by(node)
        ]
        fakes = [tensor(node) for node in graph.nodes]
        self._is_training = any(fake is not None and fake.requires_grad for fake in fakes)

    def forbid_between(self, nodes: Iterable[Node]) -> None:
        """Decline if a value or operand of `nodes` is written to between the first and the last.

        Raises:
            Decline: with the write and its place.
        """
        if not self._writes:
            return
        nodes = list(nodes)
        first, last = min(nodes), max(nodes)
        values = storages_of(
            {operand for node in nodes for operand in node.all_input_nodes} | {*nodes}
        )
        for write, written in self._writes:
            is_between = not write < first and not last < write
            if is_between and (changed := _changed(written, values)):
                raise Decline(
                    f"a value that it reads {changed} in place by `{_name(write)}` on the way"
                )

    def forbid_after(self, node: Node, operands: Iterable[Node]) -> None:
        """Decline if autograd would find a changed operand in the backward of an op at `node`.

        Eager often saves a copy instead: `x.float()` stays as it was when x is written to.

        Raises:
            Decline: with the write.
        """
        if not self._writes or not self._is_training:
            return
        values = storages_of(operands)
        for write, written in self._writes:
            if not write < node and (changed := _changed(written, values)):
                raise Decline(
                    f"a value that its backward needs {changed} in place by `{_name(write)}` "
                    "afterwards"
                )


def _name(write: Node) -> Any:
    return getattr(write.target, "__name__", write.target)


def _changed(written: frozenset[int], values: set[int]) -> str:
    """What a write does to one of the values, in words; empty if nothing."""
    if not written.isdisjoint(values - {UNTOLD}):
        return "is changed"
    is_untold = UNTOLD in written or UNTOLD in values
    return "may be changed" if is_untold and written and values else ""


UNTOLD = 0  # no storage has this address


def storages_of(nodes: Iterable[Node]) -> set[int]:
    """The memory that nodes hold, by a number for each storage; `UNTOLD` stands for any."""
    fakes = [_unwrapped(fake) for node in nodes if (fake := tensor(node)) is not None]
    return {_storage(fake) for fake in fakes if fake.layout is torch.strided}


def _unwrapped(fake: torch.Tensor) -> torch.Tensor:
    """What torch.vmap, torch.func.grad and jvp wrap; its memory is that of the wrapper."""
    while _functorch.is_batchedtensor(fake) or _functorch.is_gradtrackingtensor(fake):
        fake = _functorch.get_unwrapped(fake)
    return fake


def _storage(fake: torch.Tensor) -> int:
    if _functorch.is_functorch_wrapped_tensor(fake):
        return UNTOLD  # torch.func.functionalize gives its values a memory of their own
    return int(fake.untyped_storage()._cdata)


def written_by(node: Node) -> list[Node]:
    """The operands that a node writes to."""
    if node.op == "call_method":
        name = str(node.target)
        return _nodes(node.args[:1]) if name.endswith("_") and not name.endswith("__") else []
    if node.op != "call_function":
        return []
    if node.target in _IN_PLACE_OPERATORS:
        return _nodes(node.args[:1])
    if isinstance(node.target, torch._ops.OpOverload):
        return (
            _written_by_schema(node, node.target._schema) if node.target._schema.is_mutable else []
        )
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        return node.all_input_nodes if "mutation" in str(node.target) else []
    written = _nodes([node.kwargs.get("out")])
    if _asks_for_in_place(node):
        written += _nodes(node.args[:1])
    return written


def _written_by_schema(node: Node, schema: torch._C.FunctionSchema) -> list[Node]:
    written = []
    for index, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = node.args[index] if index < len(node.args) else node.kwargs.get(argument.name)
            written += _nodes(value if isinstance(value, (list, tuple)) else [value])
    return written


def _asks_for_in_place(node: Node) -> bool:
    """`F.relu(x, inplace=True)`, `torch.relu_(x)`."""
    name = getattr(node.target, "__name__", "")
    if name.endswith("_") and not name.endswith("__"):
        return True
    position = _position_of_inplace(node.target)
    if position is None:
        return False
    value = node.args[position] if position < len(node.args) else node.kwargs.get("inplace", False)
    return bool(value)


@cache
def _position_of_inplace(target: Any) -> int | None:
    try:
        parameters = list(inspect.signature(target).parameters)
    except (TypeError, ValueError):
        return None
    return parameters.index("inplace") if "inplace" in parameters else None


def _nodes(values: Iterable[Any]) -> list[Node]:
    return [value for value in values if isinstance(value, Node)]
