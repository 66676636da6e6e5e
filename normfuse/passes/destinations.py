"""Copies of keys and values that a launch can spare: it writes them where the copies would.

Behind a site, a key is put into a cache at the positions of its tokens, or repeated for the queries
that share it. Inductor does either as part of a kernel that normalises and turns; behind a launch,
which is opaque to it, it would take one more. The value, which is copied in the same way, joins.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch.fx import Node
from torch.fx.node import map_arg

from normfuse.ops import QK_RMS_NORM, QK_RMS_NORM_ROPE, ROPE
from normfuse.ops.destinations import Cached, Destination, Repeated, Writes
from normfuse.ops.one_launch import MAX_NORMS
from normfuse.passes import memory

aten = torch.ops.aten

_OPS = (QK_RMS_NORM, QK_RMS_NORM_ROPE, ROPE)
MAX_DISTANCE = 100  # nodes between the copies of a key and of its value
MAX_COPIES = 16  # of each row, the most that was measured; they are unrolled


@dataclass(frozen=True)
class Copy:
    """A copy of a tensor that a launch can make.

    Attributes:
        destination: where to; its tensors are nodes.
        replaced: the node that stands for what was written.
        nodes: all that the copy consists of, `replaced` among them.
    """

    destination: Destination
    replaced: Node
    nodes: tuple[Node, ...]


@dataclass(frozen=True)
class Copies:
    """Those behind one site.

    Attributes:
        results: which results of the op are written elsewhere.
        others: tensors that join, and their copies.
    """

    results: dict[int, Copy]
    others: tuple[tuple[Node, Copy], ...]

    @property
    def words(self) -> tuple[str, ...]:
        """What they are, as the key of a measurement says it."""
        return tuple(_word(copy.destination) for copy in self._all)

    @property
    def words_but_kept(self) -> tuple[str, ...]:
        """The same of results that nobody else reads."""
        return tuple(_word(copy.destination._replace(kept=False)) for copy in self._all)

    @property
    def sentence(self) -> str:
        """What the launch does besides, as a report says it."""
        words = Counter(self.words)
        return "its launch also writes " + " and ".join(
            f"{count} of what attention reads {word}" for word, count in words.items()
        )

    @property
    def nodes(self) -> tuple[Node, ...]:
        return tuple(node for copy in self._all for node in copy.nodes)

    @property
    def _all(self) -> list[Copy]:
        return [*self.results.values(), *(copy for _, copy in self.others)]

    def writes(self, num_results: int) -> Writes:
        """What the launch of an op of so many results is told, with nodes for tensors."""
        results = (self.results.get(number) for number in range(num_results))
        others = ((source, copy.destination) for source, copy in self.others)
        return Writes(
            tuple(None if copy is None else copy.destination for copy in results), tuple(others)
        )

    def replaced(self, num_results: int) -> dict[int, Node]:
        """What the memory that the launch returns behind so many results stands for."""
        return dict(enumerate((copy.replaced for copy in self._all), start=num_results))

    def is_kept(self, number: int) -> bool:
        """Whether a result of the op has memory of its own."""
        return number not in self.results or self.results[number].destination.kept


def _word(destination: Destination) -> str:
    where = "into a cache"
    if isinstance(destination, Repeated):
        where = f"repeated {destination.copies} times"
    return f"{where}, and kept" if destination.kept else where


def copies_behind(op: Node) -> Copies | None:
    """The copies that the launch of an op can make; None if there are none.

    What they need that does not depend on the op may stand behind it: see `needed_before`.
    """
    if op.target not in _OPS:
        return None
    num = len(op.meta["val"]) if op.target is ROPE else len(op.meta["val"]) // 2
    results = {cast(int, user.args[1]): user for user in op.users}
    # Statistics lie one after the other: whoever reads them gets them from rows in that order.
    if any(number >= num and user.users for number, user in results.items()):
        return None
    found = {number: _copy(user) for number, user in sorted(results.items()) if user.users}
    taken = {number: copy for number, copy in found.items() if copy is not None}
    if not taken:
        return None
    others = _siblings(op, list(taken.values())) if num < MAX_NORMS else ()
    for copies in (Copies(taken, others), Copies(taken, ())):
        if needed_before(op, copies) is not None:
            return copies
    return None


def needed_before(op: Node, copies: Copies) -> list[Node] | None:
    """What stands behind an op and must be moved before it; None if it cannot be."""
    operands: list[Node] = []
    num = len(op.meta["val"])
    map_arg(copies.writes(num), operands.append)
    needed: dict[Node, None] = {}
    while operands:
        operand = operands.pop()
        if operand is op:
            return None
        if op < operand and operand not in needed:
            if operand.op != "call_function" or operand.is_impure():
                return None
            needed[operand] = None
            operands += operand.all_input_nodes
    return sorted(needed)


def _copy(value: Node) -> Copy | None:
    """What copies a value: the only reader, or one of several, so that the value is kept, too."""
    nodes: list[Node] = []
    dims = list(range(value.meta["val"].dim()))
    kept = False
    while True:
        kept |= len(value.users) > 1
        for user in value.users:
            copy = _copied_by(user, value, tuple(dims), nodes)
            if copy is not None:
                destination = copy.destination._replace(kept=kept)
                return replace(copy, destination=destination)
        moved = [user for user in value.users if user.target is aten.permute.default]
        if len(moved) != 1:
            return None
        (value,) = moved
        dims = [dims[dim] for dim in value.args[1]]  # type: ignore[union-attr, index]
        nodes.append(value)


def _copied_by(user: Node, value: Node, dims: tuple[int, ...], nodes: list[Node]) -> Copy | None:
    if dims[-1] != len(dims) - 1:
        return None
    if user.target is aten.index_put.default:
        return _into_cache(user, value, dims, nodes)
    if user.target is aten.unsqueeze.default:
        return _repeated(user, dims, nodes)
    return None


def _only_user(node: Node) -> Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _into_cache(put: Node, value: Node, dims: tuple[int, ...], nodes: list[Node]) -> Copy | None:
    """The copy of a value into an input of the graph, which nobody reads as it was before."""
    cache, indices, written, *accumulate = put.args
    if written is not value or any(accumulate) or not isinstance(cache, Node):
        return None
    back = [user for user in cache.users if user is not put]
    is_cache = cache.op == "placeholder" and len(back) == 1
    if not is_cache or back[0].target is not aten.copy_.default or back[0].args != (cache, put):
        return None
    axes = [axis for axis, index in enumerate(indices) if index is not None]  # type: ignore[arg-type]
    if len(axes) != 1 or axes[0] == len(dims) - 1 or not _fits(cache, value, axes[0]):
        return None
    index: Any = indices[axes[0]]  # type: ignore[index]
    positions, counts_up, made_of = _positions(index)
    has_each = index.meta["val"].dim() == 1 and _same(
        index.meta["val"].shape[0], value.meta["val"].shape[axes[0]]
    )
    if not has_each or not _are_readable(positions, cache.meta["val"].device):
        return None
    cached = Cached(cache, positions, dims, axes[0], counts_up)
    return Copy(cached, put, (*nodes, *made_of, put, back[0]))


def _are_readable(positions: Node, device: torch.device) -> bool:
    """Whether a kernel finds positions where it runs, without another one that computes them."""
    numbers = positions.meta["val"]
    is_there = numbers.device == device and memory.is_in_memory(positions)
    return is_there and numbers.dtype in (torch.int64, torch.int32)


def _fits(cache: Node, value: Node, axis: int) -> bool:
    """Whether a cache holds rows of a value as they are, its columns side by side."""
    held, rows = cache.meta["val"], value.meta["val"]
    return (
        held.dtype == rows.dtype
        and held.device == rows.device
        and held.dim() == rows.dim()
        and held.stride(-1) == 1
        and all(_same(held.shape[dim], rows.shape[dim]) for dim in range(rows.dim()) if dim != axis)
    )


def _same(one: Any, other: Any) -> bool:
    """Whether two sizes are equal, without a guard on symbolic ones."""
    return str(one) == str(other)


def _positions(index: Node) -> tuple[Node, bool, tuple[Node, ...]]:
    """The positions of rows, whether they count up from a single one, and what computed them."""
    if index.target is aten.add.Tensor and not index.kwargs:
        for steps, first in (index.args[:2], index.args[1::-1]):
            if _counts(steps) and isinstance(first, Node) and _is_single(first):
                return first, True, (steps, index)  # type: ignore[return-value]
    return index, False, ()


def _counts(node: Any) -> bool:
    """Whether a node holds 0, 1, 2, ..."""
    if getattr(node, "target", None) is not torch.ops.prims.iota.default:
        return False
    return (node.kwargs.get("start"), node.kwargs.get("step")) == (0, 1)


def _is_single(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.dim() < 2 and _same(value.numel(), 1)


def _repeated(unsqueeze: Node, dims: tuple[int, ...], nodes: list[Node]) -> Copy | None:
    """The copy of a value for each of a group: expanded along an axis of its own, and cloned."""
    rank = len(dims) + 1
    axis = cast(int, unsqueeze.args[1]) % rank
    expand = _only_user(unsqueeze)
    clone = _only_user(expand) if expand is not None else None
    if expand is None or expand.target is not aten.expand.default or axis == rank - 1:
        return None
    if clone is None or clone.target is not aten.clone.default:
        return None
    before, after = unsqueeze.meta["val"].shape, expand.meta["val"].shape
    others = [dim for dim in range(rank) if dim != axis]
    copies: Any = after[axis]
    is_plain = clone.kwargs == {"memory_format": torch.contiguous_format}
    if not is_plain or not isinstance(copies, int) or not 2 <= copies <= MAX_COPIES:
        return None
    if not all(_same(before[dim], after[dim]) for dim in others):
        return None
    return Copy(Repeated(dims, axis, copies), clone, (*nodes, unsqueeze, expand, clone))


def _siblings(op: Node, copies: list[Copy]) -> tuple[tuple[Node, Copy], ...]:
    """Values that are copied as a key is, and that a launch can read: at most one."""
    for copy in copies:
        for source, other in _copied_alike(copy):
            if _may_join(op, source, other):
                return ((source, other),)
    return ()


def _copied_alike(copy: Copy) -> Iterator[tuple[Node, Copy]]:
    """What is put into another cache at the same positions, or repeated as often near by."""
    if isinstance(copy.destination, Cached):
        index: Any = next(one for one in copy.replaced.args[1] if one is not None)  # type: ignore[union-attr]
        puts = [user for user in index.users if user.target is aten.index_put.default]
        # Layers may share their positions: the next one of this layer is that of its value.
        for put in [put for put in sorted(puts) if copy.replaced < put][:1]:
            source: Any = put.args[2]
            found = _into_cache(put, source, tuple(range(source.meta["val"].dim())), [])
            if found is not None:
                yield source, found
        return
    for clone in _near(copy.replaced):
        unsqueeze = _operand_of(_operand_of(clone))
        if unsqueeze is not None and unsqueeze.target is aten.unsqueeze.default:
            source = unsqueeze.args[0]
            found = _repeated(unsqueeze, tuple(range(source.meta["val"].dim())), [])
            if found is not None and _are_alike(found, copy):
                yield source, found


def _near(clone: Node) -> Iterator[Node]:
    """The other clones around one, those behind it first."""
    for step in ("next", "prev"):
        node = clone
        for _ in range(MAX_DISTANCE):
            node = getattr(node, step)
            if node.op == "root":
                break
            if node.target is aten.clone.default:
                yield node


def _are_alike(one: Copy, other: Copy) -> bool:
    """Whether two tensors are repeated along the same axis to the same shape."""
    first, second = (copy.destination for copy in (one, other))
    assert isinstance(first, Repeated)
    assert isinstance(second, Repeated)
    shapes = [str(tuple(copy.replaced.meta["val"].shape)) for copy in (one, other)]
    return first.axis == second.axis and shapes[0] == shapes[1]


def _operand_of(node: Node | None) -> Node | None:
    """The first operand of an operation."""
    first = node.args[0] if node is not None and node.args else None
    return first if isinstance(first, Node) else None


def _may_join(op: Node, source: Node, copy: Copy) -> bool:
    """Whether a launch can copy a tensor, which is in memory and no wider than what is there.

    Nobody may read the copy before the launch: that of another layer, for example.
    """
    value = source.meta["val"]
    heads: Any = op.args[0]
    widest = max(head.meta["val"].shape[-1] for head in heads)
    return (
        memory.is_in_memory(source)
        and all(op < reader for reader in copy.replaced.users)
        and value.dim() <= 4
        and value.device == heads[0].meta["val"].device
        and value.dtype == copy.replaced.meta["val"].dtype
        and value.dtype in (torch.float16, torch.bfloat16, torch.float32)
        and value.stride(-1) == 1
        and isinstance(value.shape[-1], int)
        and value.shape[-1] <= widest
    )
