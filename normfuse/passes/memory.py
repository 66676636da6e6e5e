"""The memory of what launches read and write: once for each operand, and none for some results.

To Inductor a launch is opaque. It makes memory for a pointwise operand of each launch anew, also
where several read the same, such as tables of angles; they are given one that is in memory. And it
knows of no operand that a result could be written over, as its own kernels do where nobody reads
it afterwards, so that a training step would hold one more activation at its first gradient, where
it holds most: a launch is given the dying gradient itself to write to. Inductor checks once more
that nobody reads it afterwards, and would write to a copy.
"""

from __future__ import annotations

import operator
from typing import Any, cast

import torch
from torch.fx import Graph, Node
from torch.fx.node import map_arg
from torch.utils._pytree import tree_leaves

from normfuse.passes import inductor
from normfuse.passes.form import note_operands
from normfuse.passes.kinds import is_pointwise, is_random, is_view
from normfuse.patterns.fakes import fake_like

_TURNS = "qk_rms_norm_rope_kernel"
_TABLES = ("cos_ptr", "sin_ptr")
_GRADIENTS = ("grad_y_ptr", "grad_total_ptr")

# What may be written over what: the kernels have read an element of the latter, and the sums that
# depend on its row, before they write the former, and read it no more.
PLACES: dict[str, dict[str, tuple[str, ...]]] = {
    "rms_norm_backward_kernel": {"grad_x_ptr": _GRADIENTS, "grad_residual_ptr": _GRADIENTS},
    "rms_norm_add_rms_norm_backward_kernel": {
        "grad_x_ptr": _GRADIENTS,
        "grad_residual_ptr": _GRADIENTS,
    },
    "dual_rms_norm_add_backward_kernel": {
        "grad_x_1_ptr": _GRADIENTS,
        "grad_x_2_ptr": _GRADIENTS,
        "grad_residual_ptr": _GRADIENTS,
    },
    "rms_norms_backward_kernel": {"grad_x_ptr": tuple(f"grad_{i}_ptr" for i in (1, 2, 3, 4))},
    "qk_rms_norm_rope_backward_kernel": {f"grad_x_{i}_ptr": (f"grad_{i}_ptr",) for i in (1, 2, 3)},
}

aten = torch.ops.aten
_PRODUCTS = (aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default)


def share_operands(graph: Graph) -> None:
    """Give launches that read the same pointwise result the same memory of it.

    Each layer of a model may look at its tables in a view of its own, or cast them anew: those of
    the first serve all. Not in a backward, which would hold them while it holds most.
    """
    readers: dict[Node, list[Node]] = {}
    tables: dict[int, Node] = {}
    numbers: dict[Node, int] = {}
    for node in list(graph.nodes):
        kernel = inductor.kernel_of(node)
        if kernel is None:
            continue
        numbers = numbers or _value_numbers(graph)
        for name in _TABLES if kernel == _TURNS else ():
            table = _operands(node).get(name)
            if table is not None:
                first = tables.setdefault(numbers[table], table)
                if first is not table:
                    _replace(node, table, first)
                    _erase(table)
        for operand in dict.fromkeys(_operands(node).values()):
            readers.setdefault(operand, []).append(node)
    for operand, launches in readers.items():
        if len(launches) > 1 and operand.op == "call_function" and _owner(operand) is None:
            memory = _in_memory(operand, launches[0])
            for launch in launches:
                _replace(launch, operand, memory or operand)


def _value_numbers(graph: Graph) -> dict[Node, int]:
    """The same number for nodes that show the same: pointwise, of the same operands."""
    numbers: dict[Node, int] = {}
    known: dict[Any, int] = {}

    def named(operand: Node) -> str:
        return f"%{numbers[operand]}"

    for node in graph.nodes:
        key: Any = node
        if (is_pointwise(node) or is_view(node)) and not is_random(node):
            key = (node.target, str(map_arg((node.args, node.kwargs), named)))
        numbers[node] = known.setdefault(key, len(known))
    return numbers


def write_over_gradients(graph: Graph) -> None:
    """Give the launches in a graph the gradients that die there in the place of new memory."""
    order = {node: number for number, node in enumerate(graph.nodes)}
    for node in order:
        kernel = inductor.kernel_of(node)
        if kernel in PLACES:
            _write_over(node, PLACES[kernel], order)


def _write_over(launch: Node, places: dict[str, tuple[str, ...]], order: dict[Node, int]) -> None:
    operands = cast(dict[str, Any], launch.kwargs["kwargs"])
    if operands.get("HELD") is False:
        return  # rows that are read in chunks are read again after results are written
    nodes = _operands(launch)
    for result, gradients in places.items():
        for gradient in gradients:
            old, new = nodes.get(gradient), nodes.get(result)
            if not (old and new and _is_alike(old, new) and _is_apart(old, launch, places)):
                continue
            place = _place(launch, old, order)
            if place is not None:
                nodes = {name: node for name, node in nodes.items() if node is not old}
                _replace(launch, new, place)
                _erase(new)
                break


def _is_apart(gradient: Node, launch: Node, places: dict[str, tuple[str, ...]]) -> bool:
    """Whether a launch reads the memory of a gradient as gradients alone, and as they lie there."""
    names = {name for gradients in places.values() for name in gradients}
    return not any(
        _share_memory(gradient, node)
        for name, node in _operands(launch).items()
        if node is not gradient or name not in names
    )


def _place(launch: Node, gradient: Node, order: dict[Node, int]) -> Node | None:
    """The memory of a gradient that dies in a launch, which reads it there; None if it does not."""
    if _owner(gradient) is None:
        is_its_own = gradient.op == "call_function" and set(gradient.users) == {launch}
        place = _in_memory(gradient, launch) if is_its_own and _is_new(gradient) else None
        if place is not None:
            _replace(launch, gradient, place)
        return place
    return gradient if _is_last_reader(launch, gradient, order) else None


def _operands(launch: Node) -> dict[str, Node]:
    operands = cast(dict[str, Any], launch.kwargs["kwargs"])
    return {name: value for name, value in operands.items() if isinstance(value, Node)}


def _replace(launch: Node, old: Node, new: Node) -> None:
    launch.replace_input_with(old, new)
    note_operands(launch)


def _in_memory(operand: Node, launch: Node) -> Node | None:
    """The same in memory that it fills, made before a launch; None if its strides say otherwise."""
    value = operand.meta["val"]
    strides = list(value.stride())
    numbers = (*strides, *value.shape)
    if not all(isinstance(number, int) for number in numbers) or not _is_dense(value):
        return None
    with launch.graph.inserting_before(launch):
        memory = launch.graph.call_function(
            torch.ops.prims.inductor_force_stride_order.default, (operand, strides)
        )
    memory.meta["val"] = fake_like(value)
    return memory


def _is_dense(value: torch.Tensor) -> bool:
    """Whether the elements lie side by side, in any order of the axes."""
    axes = sorted(axis for axis in zip(value.stride(), value.shape, strict=True) if axis[1] != 1)
    expected = 1
    for stride, size in axes:
        if stride != expected:
            return False
        expected *= size
    return True


def _is_new(node: Node) -> bool:
    """Whether a node is no view of anything."""
    return not any(_share_memory(node, source) for source in node.all_input_nodes)


def _erase(node: Node) -> None:
    """Erase new memory that nobody writes to any more, and what it is a view of."""
    sources = node.all_input_nodes
    if node.op == "call_function" and not node.users:
        node.graph.erase_node(node)
        for source in sources:
            _erase(source)


def _is_alike(old: Node, new: Node) -> bool:
    """Whether a gradient fills its memory, as a new result would: in type, shape and strides."""

    def layout(node: Node) -> tuple[Any, ...]:
        value = node.meta["val"]
        sizes = (value.shape, value.stride(), value.storage_offset())
        # As text, which adds no guard where sizes are symbolic.
        return value.dtype, str(sizes), str(value.untyped_storage().nbytes())

    return layout(old) == layout(new)


def _is_last_reader(launch: Node, node: Node, order: dict[Node, int]) -> bool:
    """Whether the graph has made the memory of a node, and nothing reads it after `launch`.

    Those that read it before must be as opaque to Inductor as the launch: a pointwise reader would
    be computed where its result is read. A pointwise result has no memory: Inductor would compute
    it once to be read, and once to be written over.
    """
    owner = _owner(node)
    if owner is None:
        return False
    views = [owner]
    for view in views:  # grows
        for user in view.users:
            if user is launch:
                continue
            if _share_memory(view, user):
                views.append(user)
            elif not (_is_opaque(user) and order[user] < order[launch]):
                return False
    return True


def _owner(node: Node) -> Node | None:
    """The node whose memory a node is a view of; None if Inductor makes no memory for it."""
    while node.op == "call_function":
        if node.target is operator.getitem:
            op = node.all_input_nodes[0]
            is_part = any(_share_memory(node, source) for source in op.all_input_nodes)
            return None if is_part and inductor.kernel_of(op) is None else node
        sources = [source for source in node.all_input_nodes if _share_memory(node, source)]
        if not sources:
            return node if node.target in _PRODUCTS else None
        node = sources[0]
    return None


def is_in_memory(node: Node) -> bool:
    """Whether a value is a view of an input, or of what no pointwise kernel computes."""
    while node.op == "call_function" and not _is_opaque(node):
        sources = [source for source in node.all_input_nodes if _share_memory(node, source)]
        if not sources:
            return False
        node = sources[0]
    return True


def _is_opaque(node: Node) -> bool:
    return node.target in _PRODUCTS or inductor.kernel_of(node) is not None


def _share_memory(one: Node, other: Node) -> bool:
    return not _storages(one).isdisjoint(_storages(other))


def _storages(node: Node) -> set[int]:
    values = tree_leaves(node.meta.get("val"))
    return {v.untyped_storage()._cdata for v in values if isinstance(v, torch.Tensor)}
