"""Torch functions, tensor methods and ATen overloads, read as one vocabulary of micro-operations.

The rules speak of `MUL` and `MEAN`; this file knows that `operator.mul`, `torch.multiply`,
`x.mul(y)` and `aten.mul.Tensor` all mean `MUL`. A node that is not in the table reads as None and
ends every match.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any, cast

import torch
from torch._C import _functorch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from normfuse.patterns.decline import Decline

aten = torch.ops.aten
prims = torch.ops.prims

Operand = Node | int | float


class Kind(Enum):
    ADD = auto()
    SUB = auto()
    MUL = auto()
    DIV = auto()
    POW = auto()
    SQRT = auto()
    RSQRT = auto()
    RECIPROCAL = auto()
    MEAN = auto()
    SUM = auto()
    CLAMP = auto()
    CAST = auto()
    VIEW = auto()
    SIGMOID = auto()
    SILU = auto()
    RMS_NORM = auto()
    VECTOR_NORM = auto()


@dataclass(frozen=True)
class MicroOp:
    """What one node does: its kind, its operands (nodes or numbers), and where it reduces.

    `dims` is None for anything but a reduction with explicit dimensions; they are counted from 0.
    """

    kind: Kind
    operands: tuple[Operand, ...]
    dims: tuple[int, ...] | None = None
    keepdim: bool = False


def _names(kind: Kind, *targets: Any) -> dict[Any, Kind]:
    return dict.fromkeys(targets, kind)


_TABLE: dict[Any, Kind] = {
    **_names(Kind.ADD, operator.add, operator.iadd, torch.add, "add"),
    **_names(Kind.ADD, aten.add.Tensor, aten.add.Scalar),
    **_names(Kind.SUB, operator.sub, operator.isub, torch.sub, torch.subtract, "sub", "subtract"),
    **_names(Kind.SUB, aten.sub.Tensor, aten.sub.Scalar),
    **_names(Kind.MUL, operator.mul, operator.imul, torch.mul, torch.multiply, "mul", "multiply"),
    **_names(Kind.MUL, aten.mul.Tensor, aten.mul.Scalar),
    **_names(Kind.DIV, operator.truediv, operator.itruediv, torch.div, torch.divide),
    **_names(Kind.DIV, torch.true_divide, "div", "divide", "true_divide"),
    **_names(Kind.DIV, aten.div.Tensor, aten.div.Scalar),
    **_names(Kind.POW, operator.pow, operator.ipow, torch.pow, torch.float_power, "pow"),
    **_names(Kind.POW, "__pow__", aten.pow.Tensor_Scalar),
    **_names(Kind.SQRT, torch.sqrt, "sqrt", aten.sqrt.default),
    **_names(Kind.RSQRT, torch.rsqrt, "rsqrt", aten.rsqrt.default),
    **_names(Kind.RECIPROCAL, torch.reciprocal, "reciprocal", aten.reciprocal.default),
    **_names(Kind.MEAN, torch.mean, "mean", aten.mean.dim),
    **_names(Kind.SUM, torch.sum, "sum", aten.sum.dim_IntList),
    **_names(Kind.CLAMP, torch.clamp, torch.clamp_min, torch.maximum, "clamp", "clamp_min"),
    **_names(Kind.CLAMP, "maximum", aten.clamp.default, aten.clamp_min.default),
    **_names(Kind.CLAMP, aten.maximum.default),
    **_names(Kind.CAST, "to", "type", "type_as", "float", "half", "bfloat16", "double"),
    **_names(Kind.CAST, aten.to.dtype, aten.type_as.default, aten._to_copy.default),
    **_names(Kind.CAST, prims.convert_element_type.default),
    **_names(Kind.VIEW, "view", "reshape", "unsqueeze", "expand", "expand_as", "flatten"),
    **_names(Kind.VIEW, "contiguous", "unflatten", torch.reshape, torch.unsqueeze, torch.flatten),
    **_names(Kind.VIEW, aten.view.default, aten.reshape.default, aten._unsafe_view.default),
    **_names(Kind.VIEW, aten.unsqueeze.default, aten.expand.default, operator.getitem),
    **_names(Kind.SIGMOID, torch.sigmoid, torch.special.expit, torch.nn.functional.sigmoid),
    **_names(Kind.SIGMOID, "sigmoid", aten.sigmoid.default),
    **_names(Kind.SILU, torch.nn.functional.silu, aten.silu.default),
    **_names(Kind.RMS_NORM, torch.rms_norm, torch.nn.functional.rms_norm),
    **_names(Kind.RMS_NORM, aten.rms_norm.default),
    **_names(Kind.VECTOR_NORM, torch.linalg.vector_norm, torch.linalg.norm, torch.norm, "norm"),
    **_names(Kind.VECTOR_NORM, torch.nn.functional.normalize),
}
_SQUARES = {torch.square, "square", aten.square.default}
_TABLE |= _names(Kind.POW, *_SQUARES)

_BINARY = {Kind.ADD, Kind.SUB, Kind.MUL, Kind.DIV, Kind.POW}
_UNARY = {Kind.SQRT, Kind.RSQRT, Kind.RECIPROCAL}


def kind_of(value: Operand | None) -> Kind | None:
    """The kind of a node by its name alone, which is quick; `micro_op` may still say None."""
    if not isinstance(value, Node) or value.op not in ("call_function", "call_method"):
        return None
    return _TABLE.get(_functional_name(value.target))


def micro_op(value: Operand | None) -> MicroOp | None:
    """The micro-operation of a node; None if the node does something else, or something more.

    What a transform of torch.func wraps is something more: the shape that it shows is not its own.
    """
    op = spelling(value)
    return None if op is None or transform_of(tensor(value)) is not None else op


def spelling(value: Operand | None) -> MicroOp | None:
    """`micro_op` by what is written alone, which may stand inside of torch.vmap."""
    kind = kind_of(value)
    return None if kind is None else _READERS[kind](kind, cast(Node, value))


def _functional_name(target: Callable[..., Any] | str) -> Callable[..., Any] | str:
    """`mul_` -> `mul`: an in-place method computes the same value; `mutation.py` judges."""
    if isinstance(target, str) and target.endswith("_") and not target.endswith("__"):
        return target[:-1]
    return target


def _binary(kind: Kind, node: Node) -> MicroOp | None:
    if _functional_name(node.target) in _SQUARES:
        return MicroOp(kind, (_first(node), 2))
    operands = _arguments(node, ("self", "input"), ("other", "exponent"))
    is_plain = not node.kwargs or (node.kwargs.keys() <= _BINARY_NAMES and not _has_alpha(node))
    if operands is None or not is_plain or len(node.args) > 2:
        return None
    if not any(tensor(operand) is not None for operand in operands):
        return None
    return MicroOp(kind, operands)


_BINARY_NAMES = {"self", "input", "other", "exponent", "alpha"}


def _has_alpha(node: Node) -> bool:
    return bool(node.kwargs.get("alpha", 1) != 1)


def _unary(kind: Kind, node: Node) -> MicroOp | None:
    operands = _arguments(node, ("self", "input"))
    return None if operands is None or len(node.args) > 1 else MicroOp(kind, operands)


def _silu(kind: Kind, node: Node) -> MicroOp | None:
    """`F.silu(x)`, also in place, where its value is the same; `mutation.py` judges the write."""
    operands = _arguments(node, ("self", "input"))
    return None if operands is None else MicroOp(kind, operands)


def _clamp(kind: Kind, node: Node) -> MicroOp | None:
    """A value and, where nothing bounds it from above, what it is at least."""
    operands = _arguments(node, ("self", "input"))
    if operands is None:
        return None
    both = _arguments(node, ("self", "input"), ("min", "other"))
    has_upper = len(node.args) > 2 or node.kwargs.get("max") is not None
    return MicroOp(kind, operands if both is None or has_upper else both)


def _reduction(kind: Kind, node: Node) -> MicroOp | None:
    operands = _arguments(node, ("self", "input"))
    source = tensor(operands[0]) if operands else None
    if operands is None or source is None:
        return None
    dims = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", node.kwargs.get("axis"))
    keepdim = node.args[2] if len(node.args) > 2 else node.kwargs.get("keepdim", False)
    dims = [dims] if isinstance(dims, int) else dims
    if not isinstance(dims, (list, tuple)) or not all(isinstance(dim, int) for dim in dims):
        return None
    rank = max(source.dim(), 1)
    return MicroOp(kind, operands, tuple(dim % rank for dim in dims), bool(keepdim))


def _cast(kind: Kind, node: Node) -> MicroOp | None:
    """A change of type alone: `.to(device)` and memory formats are something more."""
    source, result = tensor(_first(node)), tensor(node)
    if source is None or result is None or source.device != result.device:
        return None
    if not (source.is_floating_point() and result.is_floating_point()):
        return None
    if source.stride() != result.stride() and node.kwargs.get("memory_format") is not None:
        return None
    return MicroOp(kind, (_first(node),))


def _view(kind: Kind, node: Node) -> MicroOp | None:
    if tensor(_first(node)) is None or tensor(node) is None:
        return None
    if node.target is operator.getitem and not _only_adds_axes(node.args[1]):
        return None
    return MicroOp(kind, (_first(node),))


def _only_adds_axes(index: Any) -> bool:
    """`x[..., None]`, but not `x[0]` or `x[:, :4]`."""
    parts = index if isinstance(index, tuple) else (index,)
    return all(part is None or part is Ellipsis or part == slice(None) for part in parts)


def _rms_norm(kind: Kind, node: Node) -> MicroOp | None:
    return MicroOp(kind, (_first(node),)) if tensor(_first(node)) is not None else None


def _vector_norm(kind: Kind, node: Node) -> MicroOp | None:
    """The length of the vectors along the last axis, by itself or as what divides them."""
    source = tensor(_first(node))
    names = ("p", "dim") if node.target in _WITH_P else ("ord", "dim")
    given = {**dict(zip(names, node.args[1:], strict=False)), **node.kwargs}
    dim: Any = given.get("dim", 1 if node.target is torch.nn.functional.normalize else None)
    if source is None or given.get(names[0], 2) not in (2, "fro", None):
        return None
    if isinstance(dim, (list, tuple)) and len(dim) == 1:
        (dim,) = dim
    if not isinstance(dim, int) or dim not in (-1, source.dim() - 1):
        return None
    return MicroOp(kind, (_first(node),), (source.dim() - 1,))


_WITH_P = {torch.norm, "norm", torch.nn.functional.normalize}


_READERS: dict[Kind, Callable[[Kind, Node], MicroOp | None]] = {
    **dict.fromkeys(_BINARY, _binary),
    **dict.fromkeys(_UNARY, _unary),
    Kind.CLAMP: _clamp,
    Kind.MEAN: _reduction,
    Kind.SUM: _reduction,
    Kind.CAST: _cast,
    Kind.VIEW: _view,
    Kind.SIGMOID: _unary,
    Kind.SILU: _silu,
    Kind.RMS_NORM: _rms_norm,
    Kind.VECTOR_NORM: _vector_norm,
}


def _first(node: Node) -> Any:
    return node.args[0] if node.args else node.kwargs.get("input", node.kwargs.get("self"))


def _arguments(node: Node, *names: tuple[str, ...]) -> tuple[Operand, ...] | None:
    found: list[Any] = list(node.args[: len(names)])
    for alternatives in names[len(found) :]:
        found.append(
            next((node.kwargs[name] for name in alternatives if name in node.kwargs), None)
        )
    usable = all(isinstance(value, (Node, int, float)) for value in found)
    return tuple(found) if usable else None


def tensor(value: Any) -> torch.Tensor | None:
    """The fake tensor that a node holds, in either stage's metadata; None if it is no tensor."""
    fake = fake_value(value) if isinstance(value, Node) else None
    return fake if isinstance(fake, torch.Tensor) else None


def fake_value(node: Node) -> Any:
    """What tracing recorded for a node: a fake tensor, or a symbolic number."""
    return node.meta.get("val", node.meta.get("example_value"))


def fake_mode(node: Node) -> FakeTensorMode:
    """The mode that a node's fake tensor belongs to."""
    fake = tensor(node)
    assert isinstance(fake, FakeTensor), f"{node} holds no fake tensor"
    return fake.fake_mode


def dtype(node: Node) -> torch.dtype:
    """The type of a node that is known to hold a tensor."""
    return fake_of(node).dtype


def fake_of(node: Node) -> torch.Tensor:
    """The fake tensor of a node that is known to hold one.

    Raises:
        Decline: a transform of torch.func wraps it, so that it is no fake tensor itself.
    """
    fake = tensor(node)
    assert fake is not None, f"{node} holds no tensor"
    transform = transform_of(fake)
    if transform is not None:
        raise Decline(f"its values are wrapped by {transform}, for which the op has no rule")
    return fake


def transform_of(value: Any) -> str | None:
    """The transform of torch.func that wraps a value; None for a tensor as it is."""
    if not isinstance(value, torch.Tensor) or not _functorch.is_functorch_wrapped_tensor(value):
        return None
    if _functorch.is_batchedtensor(value):
        return "torch.vmap"
    if _functorch.is_gradtrackingtensor(value):
        return "torch.func.grad, vjp or jvp"
    return "a transform of torch.func"


def width_of(node: Node) -> int | None:
    """The size of a node's last axis; None where that is symbolic and nothing has fixed it yet."""
    size: Any = fake_of(node).shape[-1]
    if isinstance(size, torch.SymInt):
        # `dynamic=True` makes every axis symbolic; the product with a weight has fixed this one.
        return cast("int | None", size.node.maybe_as_int())
    return int(size)


def same_sizes(left: Sequence[Any], right: Sequence[Any]) -> bool:
    """Whether two shapes are surely equal; symbolic sizes are compared without adding a guard."""
    return len(left) == len(right) and all(
        statically_known_true(a == b) for a, b in zip(left, right, strict=True)
    )


def keeps_rows(view: Node, source: Node) -> bool:
    """A view that keeps the last axis, and whose arguments are plain numbers."""
    before, after = fake_of(source), fake_of(view)
    return (
        view.all_input_nodes == [source]
        and same_sizes(before.shape[-1:], after.shape[-1:])
        and same_sizes((before.numel(),), (after.numel(),))
    )


def same_layout(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether two tensors of one shape surely have the same strides, wherever those matter."""
    return all(
        statically_known_true(size == 1) or statically_known_true(a == b)
        for size, a, b in zip(left.shape, left.stride(), right.stride(), strict=True)
    )


def source_of(value: Operand | None, kind: Kind) -> Node | None:
    """The operand of a node of this kind: `source_of(x.float(), CAST)` is `x`."""
    op = micro_op(value)
    if op is None or op.kind is not kind or not isinstance(op.operands[0], Node):
        return None
    return op.operands[0]


def pairs(op: MicroOp) -> tuple[tuple[Operand, Operand], tuple[Operand, Operand]]:
    """Both orders of a commutative operation's operands."""
    left, right = op.operands
    return (left, right), (right, left)
