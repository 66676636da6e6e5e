"""One cell as something to run: operands, the eager chain, and our op with its arguments."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map_only

from normfuse import ops
from normfuse.cli.bench import spellings
from normfuse.cli.bench.cells import MODELS, Cell
from normfuse.cli.bench.spellings import EPS, Tensor
from normfuse.cli.subject import DTYPES
from normfuse.ops.gating import Gating
from normfuse.ops.lowering import inline_form
from normfuse.ops.modulation import Modulation
from normfuse.ops.residual_sum import Scales
from normfuse.ops.rotation import Rotation
from normfuse.ops.rounding import L2, RoundingPlan

F32 = torch.float32

Shapes = tuple[tuple[str, tuple[int, ...]], ...]


@dataclass(frozen=True)
class Subject:
    """What every contender computes in one cell.

    Attributes:
        cell: which one.
        shapes: of each operand; "weight" makes it one of the norm's weights.
        eager: the chain as a user writes it, of the operands; a tuple of results.
        op: our op.
        arguments: of the operands, in the order of the op's schema.
        used: which of the op's results the chain returns.
        row_axis: of operands with two dimensions or more, the axis along which they can be cut.
        result_axis: the same of results.
    """

    cell: Cell
    shapes: Shapes
    eager: Callable[..., tuple[Tensor, ...]]
    op: Any
    arguments: Callable[..., tuple[Any, ...]]
    used: tuple[bool, ...]
    row_axis: int = 0
    result_axis: int = 0

    @property
    def dtype(self) -> torch.dtype:
        """Of all operands."""
        return DTYPES[self.cell.dtype]

    def operands(self, device: str | torch.device) -> tuple[Tensor, ...]:
        """Random operands: activations of unit variance, weights around 1, or 0 with an offset."""
        centre = 0.0 if self.eager is spellings.sandwich else 1.0
        return tuple(self._operand(kind, shape, centre, device) for kind, shape in self.shapes)

    def _operand(
        self, kind: str, shape: tuple[int, ...], centre: float, device: str | torch.device
    ) -> Tensor:
        if kind == "weight":
            value = torch.rand(shape, device=device) + centre - 0.5
        elif kind == "table":  # cos or sin: two equal halves, of which other libraries read one
            half = torch.rand(*shape[:-1], shape[-1] // 2, device=device) * 2 - 1
            value = torch.cat((half, half), dim=-1)
        else:
            value = torch.randn(shape, device=device, dtype=self.dtype)
        return value.to(self.dtype)

    def part(self, operands: tuple[Tensor, ...], start: int, length: int) -> tuple[Tensor, ...]:
        """The same operands, cut to a range of their rows."""
        return tuple(x.narrow(self.row_axis, start, length) if x.dim() > 1 else x for x in operands)

    @property
    def num_cuts(self) -> int:
        """The size of the axis along which operands can be cut."""
        return next(shape[self.row_axis] for _, shape in self.shapes if len(shape) > 1)

    def results_of(self, values: Any) -> tuple[Tensor, ...]:
        """The op's results that the chain returns."""
        return tuple(value for value, used in zip(values, self.used, strict=True) if used)

    def exact(self, operands: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The results in float64, no step rounded before."""
        return self.results_of(inline_form(self.op)(*_in_float64(self.arguments(*operands))))

    @property
    def num_bytes(self) -> int:
        """Bytes that must move: every element that the op reads or writes, once."""
        operands = self.operands("meta")
        read = tree_leaves(self.arguments(*operands))
        written = self.eager(*operands)
        tensors = [value for value in (*read, *written) if isinstance(value, torch.Tensor)]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    @property
    def streams(self) -> tuple[int, int]:
        """How many large operands are read, and how many results are written."""
        large = math.prod(self.shapes[0][1]) // 2
        num_read = sum(len(shape) > 1 and math.prod(shape) > large for _, shape in self.shapes)
        return num_read, 1 if self.cell.op.startswith("qk") else sum(self.used)


def _in_float64(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Tensors in float64, and every type that a plan names float64 as well."""
    widened = tree_map_only(torch.Tensor, torch.Tensor.double, arguments)
    names = r"\b(bf16|f16|f32)\b"
    result: tuple[Any, ...] = tree_map_only(str, lambda text: re.sub(names, "f64", text), widened)
    return result


def subject(cell: Cell) -> Subject:
    """The subject of a cell."""
    return _SUBJECTS[cell.op](cell)


def _llama(dtype: torch.dtype) -> str:
    return str(RoundingPlan.before_weight(dtype, dtype))


def _once(dtype: torch.dtype) -> str:
    return str(RoundingPlan.once(dtype, dtype))


def _gemma3_plan(dtype: torch.dtype) -> RoundingPlan:
    return replace(RoundingPlan.once(dtype, dtype), weight=(F32, F32))


def _gemma4(dtype: torch.dtype) -> str:
    return str(replace(_gemma3_plan(dtype), root="pow"))


def _rows(
    cell: Cell, num_activations: int, num_weights: int, *more: tuple[str, tuple[int, ...]]
) -> Shapes:
    activation = ("activation", (cell.rows, cell.width))
    weight = ("weight", (cell.width,))
    return (activation,) * num_activations + (weight,) * num_weights + more


def _rms_norm(cell: Cell) -> Subject:
    plan = _llama(DTYPES[cell.dtype])
    return Subject(
        cell,
        _rows(cell, 1, 1),
        _single_llama,
        ops.RMS_NORM,
        lambda x, weight: (x, weight, None, EPS, 0.0, plan),
        (True, False),
    )


def _single_llama(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    return (spellings.llama(x, weight),)


def _add_rms_norm(cell: Cell) -> Subject:
    norm = (EPS, 0.0, _llama(DTYPES[cell.dtype]))
    return Subject(
        cell,
        _rows(cell, 2, 1),
        spellings.add_rms_norm,
        ops.ADD_RMS_NORM,
        lambda x, residual, weight: (x, residual, weight, *Scales(), *norm),
        (True, True, False),
    )


def _rms_norm_add(cell: Cell) -> Subject:
    norm = (EPS, 0.0, _once(DTYPES[cell.dtype]))
    return Subject(
        cell,
        _rows(cell, 2, 1),
        spellings.rms_norm_add,
        ops.RMS_NORM_ADD,
        lambda x, residual, weight: (x, residual, weight, *Scales(), *norm),
        (True, False),
    )


def _rms_norm_add_rms_norm(cell: Cell) -> Subject:
    norm = (EPS, 1.0, str(_gemma3_plan(DTYPES[cell.dtype])))
    return Subject(
        cell,
        _rows(cell, 2, 2),
        spellings.sandwich,
        ops.RMS_NORM_ADD_RMS_NORM,
        lambda x, residual, *weights: (x, residual, *weights, *Scales(), *norm, *norm),
        (True, True, False, False),
    )


def _dual(cell: Cell) -> Subject:
    has_norm = cell.op == "dual_rms_norm_add_rms_norm"
    num_norms = 4 if has_norm else 3
    norms = (EPS, 0.0, _gemma4(DTYPES[cell.dtype])) * num_norms

    def arguments(*operands: Tensor) -> tuple[Any, ...]:
        *tensors, layer_scalar = operands
        return (*tensors, *Scales(total_tensor=layer_scalar), *norms)

    return Subject(
        cell,
        _rows(cell, 3, num_norms, ("weight", (1,))),
        spellings.dual_and_norm if has_norm else spellings.dual,
        ops.DUAL_RMS_NORM_ADD_RMS_NORM if has_norm else ops.DUAL_RMS_NORM_ADD,
        arguments,
        (True,) * (1 + has_norm) + (False,) * num_norms,
    )


def _rms_norms(cell: Cell) -> Subject:
    dtype = DTYPES[cell.dtype]
    router = str(replace(RoundingPlan.before_weight(dtype, dtype), root="pow"))
    numbers = ([0.0] * 3, [1.0, cell.width**-0.5, 1.0], [_gemma4(dtype), router, _gemma4(dtype)])
    return Subject(
        cell,
        _rows(cell, 1, 3),
        spellings.expert_norms,
        ops.RMS_NORMS,
        lambda x, *weights: (x, list(weights), EPS, *numbers),
        (True, True, True, False),
    )


def _l2_norm(cell: Cell) -> Subject:
    dtype = DTYPES[cell.dtype]
    plan = RoundingPlan(dtype, dtype, (dtype,), None, dtype, mean=L2)
    return Subject(
        cell,
        (("activation", (1, cell.rows, *cell.heads, cell.width)),),
        spellings.l2_norm,
        ops.L2_NORM,
        lambda x: (x, None, EPS, str(plan)),
        (True, False),
        row_axis=1,
        result_axis=1,
    )


def _gated_rms_norm(cell: Cell) -> Subject:
    dtype = DTYPES[cell.dtype]
    shape = (cell.rows * cell.heads[0], cell.width)
    settings = (EPS, 0.0, 1, False, "silu", _llama(dtype), str(Gating(F32, F32, F32, dtype)))
    return Subject(
        cell,
        (("activation", shape), ("activation", shape), ("weight", (cell.width,))),
        spellings.gated,
        ops.GATED_RMS_NORM,
        lambda x, gate, weight: (x, gate, weight, *settings),
        (True, False),
    )


def _modulated_rms_norm(cell: Cell) -> Subject:
    dtype = DTYPES[cell.dtype]
    batch = min(cell.rows, 4)
    conditioning = ("activation", (batch, 1, cell.width))
    types = (str(RoundingPlan.once(dtype, None)), str(Modulation(dtype, dtype, dtype, dtype)))
    return Subject(
        cell,
        (
            ("activation", (batch, cell.rows // batch, cell.width)),
            conditioning,
            conditioning,
        ),
        spellings.modulated,
        ops.MODULATED_RMS_NORM,
        lambda x, scale, shift: (x, scale, shift, None, EPS, 0.0, 1.0, *types),
        (True, False),
    )


def _qk(cell: Cell) -> Subject:
    """q and k are slices of a packed projection, heads first as attention wants them."""
    dtype = DTYPES[cell.dtype]
    heads_q, heads_k = cell.heads
    split = partial(spellings.heads, heads_q=heads_q, heads_k=heads_k, width=cell.width)
    norm, offset, plan = norm_of_heads(cell, dtype)
    turns = cell.op == "qk_rms_norm_rope"
    rotation = str(Rotation("half", cell.width, dtype, dtype))
    numbers = ([EPS] * 2, [offset] * 2, [plan] * 2)

    def eager(
        qkv: Tensor, weight_q: Tensor, weight_k: Tensor, *tables: Tensor
    ) -> tuple[Tensor, ...]:
        q, k = split(qkv)
        q = norm(q, weight_q).transpose(1, 2)
        k = norm(k, weight_k).transpose(1, 2)
        return spellings.apply_rotary_pos_emb(q, k, *tables) if turns else (q, k)

    def arguments(
        qkv: Tensor, weight_q: Tensor, weight_k: Tensor, *tables: Tensor
    ) -> tuple[Any, ...]:
        xs = [x.transpose(1, 2) for x in split(qkv)]
        if not turns:
            return xs, [weight_q, weight_k], *numbers
        cos, sin = (table.unsqueeze(1) for table in tables)
        return xs, [weight_q, weight_k], cos, sin, *numbers, [rotation] * 2

    packed = (1, cell.rows, (heads_q + 2 * heads_k) * cell.width)
    table = ("table", (1, cell.rows, cell.width))
    weight = ("weight", (cell.width,))
    return Subject(
        cell,
        (("activation", packed), weight, weight, *((table,) * 2 if turns else ())),
        eager,
        ops.QK_RMS_NORM_ROPE if turns else ops.QK_RMS_NORM,
        arguments,
        (True, True, False, False),
        row_axis=1,
        result_axis=2,
    )


def _rope(cell: Cell) -> Subject:
    """q and k are projections of their own, heads first as attention wants them."""
    dtype = DTYPES[cell.dtype]
    rotation = str(Rotation("half", cell.width, dtype, dtype))

    def split(*projections: Tensor) -> list[Tensor]:
        return [torch.unflatten(x, -1, (-1, cell.width)).transpose(1, 2) for x in projections]

    def eager(q: Tensor, k: Tensor, *tables: Tensor) -> tuple[Tensor, ...]:
        return spellings.apply_rotary_pos_emb(*split(q, k), *tables)

    def arguments(q: Tensor, k: Tensor, *tables: Tensor) -> tuple[Any, ...]:
        cos, sin = (table.unsqueeze(1) for table in tables)
        return split(q, k), cos, sin, [rotation] * 2

    table = ("table", (1, cell.rows, cell.width))
    return Subject(
        cell,
        (
            *(("activation", (1, cell.rows, heads * cell.width)) for heads in cell.heads),
            *(table, table),
        ),
        eager,
        ops.ROPE,
        arguments,
        (True, True),
        row_axis=1,
        result_axis=2,
    )


def norm_of_heads(cell: Cell, dtype: torch.dtype) -> tuple[spellings.Norm, float, str]:
    """The norm of the model with these heads: its spelling, offset and plan."""
    model = next(name for name, heads in MODELS.items() if heads == (*cell.heads, cell.width))
    if model.startswith("Qwen"):
        return spellings.llama, 0.0, _llama(dtype)
    if model.startswith("Gemma-3"):
        return spellings.gemma3, 1.0, str(_gemma3_plan(dtype))
    return spellings.gemma4, 0.0, _gemma4(dtype)


_SUBJECTS: dict[str, Callable[[Cell], Subject]] = {
    "rms_norm": _rms_norm,
    "add_rms_norm": _add_rms_norm,
    "rms_norm_add": _rms_norm_add,
    "rms_norm_add_rms_norm": _rms_norm_add_rms_norm,
    "dual_rms_norm_add": _dual,
    "dual_rms_norm_add_rms_norm": _dual,
    "rms_norms": _rms_norms,
    "l2_norm": _l2_norm,
    "gated_rms_norm": _gated_rms_norm,
    "modulated_rms_norm": _modulated_rms_norm,
    "qk_rms_norm": _qk,
    "qk_rms_norm_rope": _qk,
    "rope": _rope,
}
