"""What every column of a node is made of: columns of one source, times columns of tables.

Rotary embeddings are spelled with slices, chunks, concatenations, stacks and complex numbers. None
of these is matched: the nodes run on the numbers of the columns instead, and what comes out says
which column went where. Column c is written c + 1, with a minus where it was negated; 0 is nothing.
"""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Node
from torch.fx.node import map_arg

from normfuse.ops.rounding import FLOATS, is_exact_cast
from normfuse.patterns.micro_ops import Kind, fake_of, micro_op, same_sizes, tensor
from normfuse.patterns.mutation import written_by

aten = torch.ops.aten

# They move columns, and run on column numbers as they are. A move along a leading dimension changes
# its size, which is noticed; one that does not (roll, flip, an index of numbers) is left out.
MOVES: set[Any] = {
    *(operator.getitem, torch.cat, torch.concat, torch.stack, torch.chunk, torch.split),
    *(torch.narrow, torch.unbind, torch.flatten, torch.select, torch.unsqueeze),
    *("chunk", "split", "narrow", "unbind", "flatten", "select", "unsqueeze"),
    *(aten.slice.Tensor, aten.cat.default, aten.stack.default, aten.split.Tensor),
    *(aten.select.int, aten.unbind.int, aten.split_with_sizes.default, aten.unsqueeze.default),
}
_NEGATIONS: set[Any] = {operator.neg, torch.neg, torch.negative, "neg", aten.neg.default}
RESHAPES: set[Any] = {
    *(torch.reshape, "view", "reshape", "unflatten"),
    *(aten.view.default, aten.reshape.default, aten._unsafe_view.default),
}
# What tables are made by, for every value alike.
_PURE: set[Any] = {
    *(torch.cos, torch.sin, "cos", "sin", aten.cos.default, aten.sin.default, torch.complex),
    *(torch.repeat_interleave, "repeat_interleave", "repeat"),
    *(torch.conj, torch.resolve_conj, "conj", "resolve_conj"),
    *(aten.complex.default, aten._conj.default, aten.expand.default, aten.clone.default),
}
TO_COMPLEX: set[Any] = {torch.view_as_complex, aten.view_as_complex.default}
_TO_REAL: set[Any] = {torch.view_as_real, aten.view_as_real.default}
_REPEATABLE = MOVES | _NEGATIONS | _TO_REAL | _PURE


@dataclass(frozen=True)
class Table:
    """A factor of columns: a node of cos or sin, or one part of a complex node.

    Attributes:
        node: what multiplies.
        part: "real" or "imag" of a complex node.
        is_negated: its negative is the factor.
    """

    node: Node
    part: str = ""
    is_negated: bool = False


@dataclass(frozen=True)
class Term:
    """Columns of the source, and for each the column of the table that multiplies it; one rank."""

    source: torch.Tensor
    table: torch.Tensor

    def negated(self) -> Term:
        return Term(-self.source, self.table)


@dataclass(frozen=True)
class Columns:
    """A node as a sum of terms, one for each table; the table None is a factor of 1.

    Attributes:
        terms: their tensors have sizes of 1 in place of the source's leading dimensions.
        dtype: the type in which the source met its tables; None if it has not yet.
        is_rounded: the sum was cast.
    """

    terms: dict[Table | None, Term]
    dtype: torch.dtype | None = None
    is_rounded: bool = False

    @classmethod
    def of(cls, source: Node) -> Columns:
        """The source itself."""
        fake = fake_of(source)
        numbers = torch.arange(1, int(fake.shape[-1]) + 1, dtype=torch.int32)
        numbers = numbers.reshape((1,) * (fake.dim() - 1) + (-1,))
        return cls({None: Term(numbers, torch.zeros_like(numbers))})

    def each(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Columns:
        """The same columns, moved."""
        moved = {
            table: Term(function(term.source), function(term.table))
            for table, term in self.terms.items()
        }
        return replace(self, terms=moved)

    def negated(self) -> Columns:
        return replace(self, terms={key: term.negated() for key, term in self.terms.items()})


Value = Columns | tuple[Columns, ...]
Keys = dict[Node, Any]


class Reader:
    """Follows one source through a graph.

    Attributes:
        values: what each node that was followed is made of.
    """

    def __init__(self, source: Node, keys: Keys | None = None) -> None:
        """`keys` as in `value_key`; by default none are kept."""
        self._keys = keys
        self._leading = fake_of(source).shape[:-1]
        self._tables: dict[Any, Table] = {}
        self.values: dict[Node, Value] = {source: Columns.of(source)}

    def read(self, node: Node) -> bool:
        """Whether a node, whose operands were followed, is made of columns of the source."""
        value = self._evaluate(node)
        if value is None:
            return False
        self.values[node] = value
        return True

    def _evaluate(self, node: Node) -> Value | None:
        if node.op not in ("call_function", "call_method"):
            return None
        for targets, evaluate in (
            (MOVES, self._move),
            (_NEGATIONS, self._negate),
            (RESHAPES, self._reshape),
            (TO_COMPLEX, self._as_parts),
            (_TO_REAL, self._as_parts),
        ):
            if node.target in targets:
                return evaluate(node) if node.args or targets is MOVES else None
        op = micro_op(node)
        if op is None:
            return None
        if op.kind is Kind.CAST:
            return self._cast(node)
        if op.kind is Kind.MUL:
            return self._multiply(node, *op.operands)
        if op.kind in (Kind.ADD, Kind.SUB):
            return self._add(node, op.kind, *op.operands)
        return None

    def _known(self, value: Any) -> Columns | None:
        found = self.values.get(value) if isinstance(value, Node) else None
        return found if isinstance(found, Columns) else None

    def _keeps_leading(self, node: Node) -> bool:
        fake = tensor(node)
        if fake is None:  # a tuple, whose items are looked at in turn
            return True
        num = len(self._leading)
        return fake.dim() > num and same_sizes(fake.shape[:num], self._leading)

    def _move(self, node: Node) -> Value | None:
        operands = [self.values.get(operand) for operand in node.all_input_nodes]
        if not self._keeps_leading(node) or not operands or None in operands:
            return None
        if node.target is operator.getitem:
            if isinstance(operands[0], tuple):
                return operands[0][node.args[1]]  # type: ignore[index]
            if not _is_basic(node.args[1]):
                return None
        parts = [operand for operand in operands if isinstance(operand, Columns)]
        if len(parts) != len(operands) or not _agree(parts):
            return None
        keys = list(dict.fromkeys(key for part in parts for key in part.terms))
        moved: dict[Table | None, Any] = {}
        for key in keys:
            sources = self._run(node, key, "source")
            tables = _none(sources) if key is None else self._run(node, key, "table")
            if sources is None or tables is None:
                return None
            moved[key] = sources, tables
        dtype = next((part.dtype for part in parts if part.dtype is not None), None)
        shell = Columns({}, dtype, any(part.is_rounded for part in parts))
        if isinstance(moved[keys[0]][0], torch.Tensor):
            return replace(shell, terms={key: Term(*pair) for key, pair in moved.items()})
        return tuple(
            replace(shell, terms={k: Term(pair[0][i], pair[1][i]) for k, pair in moved.items()})
            for i in range(len(moved[keys[0]][0]))
        )

    def _run(self, node: Node, key: Table | None, name: str) -> Any:
        """The node's own operation on the numbers of one term; zeros where a part has none."""

        def numbers(operand: Node) -> torch.Tensor:
            terms = self.values[operand].terms  # type: ignore[union-attr]
            term = terms.get(key)
            some: torch.Tensor = getattr(term or next(iter(terms.values())), name)
            return some if term is not None else torch.zeros_like(some)

        args, kwargs = map_arg((node.args, node.kwargs), numbers)
        try:
            if isinstance(node.target, str):
                return getattr(args[0], node.target)(*args[1:], **kwargs)
            return node.target(*args, **kwargs)
        except (RuntimeError, TypeError, IndexError, ValueError):
            return None  # it moves the leading dimensions, which have size 1 here

    def _negate(self, node: Node) -> Columns | None:
        value = self._known(node.args[0])
        return value.negated() if value is not None else None

    def _reshape(self, node: Node) -> Columns | None:
        value = self._known(node.args[0])
        if value is None or not self._keeps_leading(node):
            return None
        num = len(self._leading)
        sizes = fake_of(node).shape[num:]
        if not all(isinstance(size, int) for size in sizes):
            return None
        shape = (1,) * num + tuple(sizes)
        some = next(iter(value.terms.values())).source
        if some.numel() != torch.Size(shape).numel():
            return None
        return value.each(lambda numbers: numbers.reshape(shape))

    def _as_parts(self, node: Node) -> Columns | None:
        """Complex numbers are written as their two columns, and so is what becomes of them."""
        return self._known(node.args[0])

    def _cast(self, node: Node) -> Columns | None:
        value, source = self._known(node.args[0]), node.args[0]
        if value is None or not isinstance(source, Node):
            return None
        before, after = fake_of(source).dtype, fake_of(node).dtype
        if value.dtype is None:
            return value if is_exact_cast(before, after) else None
        return None if value.is_rounded else replace(value, is_rounded=True)

    def _multiply(self, node: Node, left: Any, right: Any) -> Columns | None:
        if self._known(left) is None:
            left, right = right, left
        value, fake = self._known(left), tensor(right)
        if value is None or fake is None or right in self.values or list(value.terms) != [None]:
            return None
        dtype = fake_of(left).dtype
        if not self._keeps_leading(node):
            return None
        if fake_of(node).dtype != torch.promote_types(dtype, fake.dtype):
            return None
        if dtype.is_complex != fake.dtype.is_complex:
            return None
        if not dtype.is_complex and fake.dtype not in FLOATS:
            return None
        if dtype.is_complex:
            return self._multiply_complex(value, right)
        plain = value.terms[None].source
        width = fake.shape[-1] if fake.dim() else 0
        if width != plain.shape[-1] or not same_sizes(fake_of(node).shape, fake_of(left).shape):
            return None
        at = torch.arange(1, width + 1, dtype=torch.int32).expand(plain.shape)
        if right.target in _NEGATIONS and right.args and tensor(right.args[0]) is not None:
            right, plain = right.args[0], -plain  # a product rounds the same whatever its sign
        return Columns({self._table(right): Term(plain, at)}, dtype)

    def _multiply_complex(self, value: Columns, node: Node) -> Columns | None:
        """(a + bi) * (c + di): (a * c - b * d) + (b * c + a * d)i."""
        plain = value.terms[None].source
        width = fake_of(node).shape[-1] if fake_of(node).dim() else 0
        if plain.dim() != len(self._leading) + 2 or width != plain.shape[-2]:
            return None
        at = torch.arange(1, width + 1, dtype=torch.int32)[:, None].expand(plain.shape)
        a, b = plain.unbind(-1)
        crossed = torch.stack((-b, a), dim=-1)
        terms: dict[Table | None, Term] = {
            self._table(node, "real"): Term(plain, at),
            self._table(node, "imag"): Term(crossed, at),
        }
        return Columns(terms, fake_of(node).dtype.to_real())

    def _add(self, node: Node, kind: Kind, left: Any, right: Any) -> Columns | None:
        first, second = self._known(left), self._known(right)
        if first is None or second is None or not _agree([first, second]):
            return None
        if first.dtype is None or second.dtype is None or first.is_rounded or second.is_rounded:
            return None
        if first.terms.keys() & second.terms.keys():
            return None
        if fake_of(node).dtype != torch.promote_types(fake_of(left).dtype, fake_of(right).dtype):
            return None
        second = second.negated() if kind is Kind.SUB else second
        return replace(first, terms={**first.terms, **second.terms})

    def _table(self, node: Node, part: str = "") -> Table:
        """One table for all nodes that view the same values in the same way."""
        return self._tables.setdefault((value_key(node, self._keys), part), Table(node, part))


def _none(numbers: Any) -> Any:
    """No column of any table, for what an operation made of column numbers."""
    if isinstance(numbers, torch.Tensor):
        return torch.zeros_like(numbers)
    return numbers and [torch.zeros_like(some) for some in numbers]


def _is_basic(index: Any) -> bool:
    """`x[..., :4]`, but not `x[[0, 0]]`."""
    parts = index if isinstance(index, tuple) else (index,)
    return all(part is None or isinstance(part, (int, slice, type(...))) for part in parts)


def _agree(parts: list[Columns]) -> bool:
    """Whether all that met tables did so in one type; the others were not multiplied at all."""
    return len({part.dtype for part in parts if part.dtype is not None}) <= 1


def value_key(node: Node, keys: Keys | None = None) -> Any:
    """Equal for two nodes that compute the same value in the same way, if nothing is written to.

    `keys` keeps those of many calls on one graph, where a rewrite may put equal values in the place
    of others.
    """
    return _key(node, {} if keys is None else keys)


def _key(node: Node, known: Keys) -> Any:
    if node not in known:
        known[node] = node
        if _is_repeatable(node):
            named: Any = lambda inner: _Named(_key(inner, known))  # noqa: E731 - fx's type fits none
            text = f"{node.target} {map_arg((node.args, node.kwargs), named)}"
            known[node] = hashlib.sha256(text.encode()).hexdigest()
    return known[node]


def chain_of(node: Node) -> list[Node]:
    """The nodes that `value_key` looked at."""
    found = [node]
    for one in found:
        if _is_repeatable(one):
            found += [operand for operand in one.all_input_nodes if operand not in found]
    return found


def _is_repeatable(node: Node) -> bool:
    is_pure = micro_op(node) is not None or node.target in _REPEATABLE
    return is_pure and not written_by(node)


class _Named:
    """A key inside an argument list; prints as what it is."""

    def __init__(self, key: Any) -> None:
        self.key = key

    def __repr__(self) -> str:
        return f"<{self.key}>"
