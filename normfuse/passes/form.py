"""What an op is lowered to: traced once, then copied to every site with the same signature."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node
from torch.fx.node import map_arg
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from normfuse.passes import inductor
from normfuse.patterns.fakes import fake_like


@dataclass(frozen=True)
class Form:
    """A traced graph of plain operations or of one launch.

    Attributes:
        inputs: its placeholders, one for each node among the arguments, in order.
        body: what is copied.
        results: a node for each result of the op; None for those that are not computed.
    """

    inputs: tuple[Node, ...]
    body: tuple[Node, ...]
    results: tuple[Node | None, ...]

    @classmethod
    def of(
        cls,
        arguments: tuple[Any, ...],
        function: Callable[..., Any],
        used: tuple[bool, ...],
        *,
        functional: bool,
    ) -> Form:
        """The form of an op; only what the used results need stays in it.

        Args:
            arguments: what the function takes, with nodes for tensors and symbolic numbers.
            function: returns one tensor, or None, for each result.
            used: for each result, whether anything reads it.
            functional: whether to trace without mutation, as a launch needs it.
        """
        leaves, structure = tree_flatten(arguments)

        def flat(*values: Any) -> Any:
            remaining = iter(values)
            filled = [next(remaining) if isinstance(a, Node) else a for a in leaves]
            results = function(*tree_unflatten(filled, structure))
            return [one if is_used else None for one, is_used in zip(results, used, strict=True)]

        inputs = [_unaliased(operand.meta["val"]) for operand in _nodes(arguments)]
        graph = inductor.trace(flat, inputs, functional=functional).graph
        (output,) = graph.find_nodes(op="output")
        placeholders = tuple(graph.find_nodes(op="placeholder"))
        body = tuple(node for node in graph.nodes if node.op not in ("placeholder", "output"))
        return cls(placeholders, body, tuple(output.args[0]))

    def copy_before(
        self, node: Node, arguments: tuple[Any, ...], replaced: dict[int, Node]
    ) -> list[Node | None]:
        """Copy the body before the op `node`; returns the nodes of the results.

        Args:
            node: the op.
            arguments: what the form was traced with, or its like at this site.
            replaced: the nodes that results will replace, whose views are already there.
        """
        operands = _nodes(arguments)
        copies = dict(zip(self.inputs, operands, strict=True))
        memory = _Memory(self.inputs, operands)
        for number, known in replaced.items():
            result = self.results[number]
            if result is not None:
                memory.adopt(result.meta["val"], known.meta["val"])
        place = {key: node.meta[key] for key in _PLACE if key in node.meta}
        for source in self.body:
            with node.graph.inserting_before(node):
                copy = node.graph.node_copy(source, copies.__getitem__)
            copy.meta.update(place)
            copy.meta["val"] = memory.renewed(source.meta["val"])
            if isinstance(copy.target, torch._ops.HigherOrderOperator):
                note_operands(copy)
            copies[source] = copy
        return [None if result is None else copies[result] for result in self.results]


def note_operands(launch: Node) -> None:
    """Note the values of a launch's operands, as Inductor asks for them."""
    launch.meta["eager_input_vals"] = map_arg(
        (launch.args, launch.kwargs), lambda operand: operand.meta["val"]
    )


_PLACE = ("nn_module_stack", "stack_trace")


def operands_of(node: Node) -> list[Node]:
    """The node arguments in order, those inside lists too, each as often as it is passed."""
    return _nodes(node.args)


def _nodes(arguments: tuple[Any, ...]) -> list[Node]:
    return [argument for argument in tree_flatten(arguments)[0] if isinstance(argument, Node)]


def _unaliased(value: Any) -> Any:
    """An input that shares memory with no other and begins at 0, as the sites' own inputs may."""
    return fake_like(value) if isinstance(value, torch.Tensor) else value


class _Memory:
    """The storages of one copy: those of its operands, and a new one for each that a form made.

    Copies of a form must never look like aliases of each other: Inductor would then copy a buffer
    before it is written to. Views, though, must share the storage of what they view.
    """

    def __init__(self, inputs: tuple[Node, ...], operands: list[Node]) -> None:
        self._storages: dict[int, tuple[torch.UntypedStorage, int | torch.SymInt]] = {}
        for placeholder, operand in zip(inputs, operands, strict=True):
            value = operand.meta["val"]
            if isinstance(value, torch.Tensor):
                key = placeholder.meta["val"].untyped_storage()._cdata
                self._storages[key] = value.untyped_storage(), value.storage_offset()

    def adopt(self, value: torch.Tensor, known: torch.Tensor) -> None:
        """Let a value of the form have the storage of another, unless it is a view of an operand"""
        key = value.untyped_storage()._cdata
        self._storages.setdefault(key, (known.untyped_storage(), 0))

    def renewed(self, value: Any) -> Any:
        """A value of the form as this copy has it; numbers stay, as the sizes are the same."""
        if not isinstance(value, torch.Tensor):
            return tree_map_only(torch.Tensor, self.renewed, value)
        key = value.untyped_storage()._cdata
        if key in self._storages:
            storage, offset = self._storages[key]
            return fake_like(value, storage, offset + value.storage_offset())
        fake = fake_like(value)
        self._storages[key] = fake.untyped_storage(), 0
        return fake
