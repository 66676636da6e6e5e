"""Rotary position embedding of one tensor: which columns turn, and where the turn rounds.

Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", 2021. Columns turn in
pairs (a, b): a' = a * cos - b * sin, b' = b * cos + a * sin. Llama pairs column j with j + D / 2
("half"); GLM and Cohere pair neighbours ("interleaved"); Llama 4 multiplies neighbours as complex
numbers ("complex"). Only `dim` columns turn, the others pass ("partial").
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch

from normfuse.ops.layout import dense_like
from normfuse.ops.rounding import DTYPES, SHORT
from normfuse.ops.validation import check_table

LAYOUTS = ("half", "interleaved", "complex")


@dataclass(frozen=True)
class Rotation:
    """How one tensor (..., D) is turned, in the order in which eager takes the steps.

        turned = x[..., start : start + dim].to(dtype)
        turned = turned * cos + partners(turned) * sin     each step in the promoted type
        y      = x with `turned` in its place, in `out`

    Attributes:
        layout: `"half"`, `"interleaved"` or `"complex"`.
        dim: how many columns turn; even.
        start: the first of them.
        dtype: the type in which x meets cos and sin.
        out: the type of the result.
        is_contiguous: the result is contiguous, as `torch.cat` makes it; else laid out as x.
    """

    layout: str
    dim: int
    dtype: torch.dtype
    out: torch.dtype
    start: int = 0
    is_contiguous: bool = False

    def __post_init__(self) -> None:
        if self.layout not in LAYOUTS:
            raise ValueError(f"layout must be one of {LAYOUTS}, got {self.layout!r}: choose one")
        if self.dim < 2 or self.dim % 2 or self.start < 0:
            raise ValueError(
                f"dim must be even and at least 2, and start not negative, got dim={self.dim}, "
                f"start={self.start}: pass the columns that turn"
            )

    def __str__(self) -> str:
        """The form that ops carry: `half 64 in=bf16 out=bf16`."""
        words = [self.layout, str(self.dim)]
        if self.start:
            words.append(f"at={self.start}")
        words += [f"in={SHORT[self.dtype]}", f"out={SHORT[self.out]}"]
        if self.is_contiguous:
            words.append("contiguous")
        return " ".join(words)

    @staticmethod
    def parse(text: str) -> Rotation | None:
        """The rotation that `str(rotation)` wrote; None for "none"; ValueError for anything else"""
        return _parse(text)


@cache
def _parse(text: str) -> Rotation | None:
    if text == "none":
        return None
    short = "|".join(DTYPES)
    match = re.fullmatch(
        rf"(?P<layout>{'|'.join(LAYOUTS)}) (?P<dim>\d+)(?: at=(?P<start>\d+))?"
        rf" in=(?P<dtype>{short}) out=(?P<out>{short})(?P<contiguous> contiguous)?",
        text,
    )
    if match is None:
        raise ValueError(
            f"a rotation reads like 'half 64 in=bf16 out=bf16' or 'none', got {text!r}: "
            "write it with str(Rotation(...))"
        )
    words = match.groupdict()
    return Rotation(
        layout=words["layout"],
        dim=int(words["dim"]),
        start=int(words["start"] or 0),
        dtype=DTYPES[words["dtype"]],
        out=DTYPES[words["out"]],
        is_contiguous=words["contiguous"] is not None,
    )


def checked_rotations(
    named: Sequence[tuple[str, torch.Tensor, torch.dtype]],
    cos: torch.Tensor,
    sin: torch.Tensor,
    layout: str,
    rotary_dim: int | None,
) -> list[str]:
    """How public functions turn their tensors, as ops carry it.

    Args:
        named: each tensor (..., D) that turns: its name, itself, and the type of what turns.
        cos: broadcasts against each.
        sin: the same.
        layout: one of `LAYOUTS`.
        rotary_dim: how many of the first columns turn; None for all.

    Raises:
        TypeError, ValueError: a type, shape or device does not fit.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {LAYOUTS}, got {layout!r}: choose one")
    rotations = []
    for name, x, out in named:
        dim = x.shape[-1] if rotary_dim is None else rotary_dim
        check_table("cos", cos, name, x, dim)
        check_table("sin", sin, name, x, dim)
        wide = torch.float32 if layout == "complex" else out
        rotations.append(str(Rotation(layout, dim, wide, out)))
    if sin.shape != cos.shape or sin.dtype != cos.dtype:
        raise ValueError(
            f"sin must have the shape and type of cos, {tuple(cos.shape)} {cos.dtype}, got "
            f"{tuple(sin.shape)} {sin.dtype}: expand or cast it before the call"
        )
    return rotations


def rotated(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, rotation: Rotation
) -> torch.Tensor:
    """The meaning: x (..., D), cos and sin (..., dim) or (..., dim / 2) that broadcast -> (..., D).

    Tables of dim / 2 columns hold one angle for each pair.
    """
    first, last = rotation.start, rotation.start + rotation.dim
    turned = x if rotation.dim == x.shape[-1] else x[..., first:last]
    turned = turned.to(rotation.dtype)
    if rotation.layout == "complex":
        turned = _turned_as_complex(turned, cos, sin)
    else:
        cos, sin = (_by_column(table, rotation) for table in (cos, sin))
        turned = turned * cos + partners(turned, rotation.layout) * sin
    turned = turned.to(rotation.out)
    if rotation.dim < x.shape[-1]:
        passed = x.to(rotation.out)
        turned = torch.cat((passed[..., :first], turned, passed[..., last:]), dim=-1)
    return _laid_out(turned, x, rotation)


def _laid_out(y: torch.Tensor, x: torch.Tensor, rotation: Rotation) -> torch.Tensor:
    wanted = empty_result(x, rotation)
    return dense_like(y, wanted)


def empty_result(x: torch.Tensor, rotation: Rotation) -> torch.Tensor:
    """An uninitialised result of `rotated`."""
    layout = torch.contiguous_format if rotation.is_contiguous else torch.preserve_format
    return torch.empty_like(x, dtype=rotation.out, memory_format=layout)


def _turned_as_complex(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * torch.complex(cos, sin)).flatten(-2)


def partners(x: torch.Tensor, layout: str) -> torch.Tensor:
    """(-b, a) for every pair (a, b) of columns: `rotate_half` and its interleaved form."""
    if layout == "half":
        half = x.shape[-1] // 2  # slices, as models have them: Inductor leaves a split in its place
        return torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return torch.stack((-x[..., 1::2], x[..., 0::2]), dim=-1).flatten(-2)


def _by_column(table: torch.Tensor, rotation: Rotation) -> torch.Tensor:
    """A table of one angle for each pair, with one for each column."""
    if table.shape[-1] == rotation.dim:
        return table
    if rotation.layout == "half":
        return torch.cat((table, table), dim=-1)
    return table.repeat_interleave(2, dim=-1)


def rotated_backward(
    grad: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, rotation: Rotation
) -> torch.Tensor:
    """The gradient of x for `grad` (..., D), unrounded: the turn by the negative angle.

    grad_a = grad_a' * cos + grad_b' * sin, grad_b = grad_b' * cos - grad_a' * sin; a table by
    columns may hold another angle for either of a pair.
    """
    layout = "half" if rotation.layout == "half" else "interleaved"
    cos, sin = (_by_column(table, rotation).to(grad.dtype) for table in (cos, sin))
    first, last = rotation.start, rotation.start + rotation.dim
    turned = grad[..., first:last]
    turned = turned * cos - partners(turned * sin, layout)
    return torch.cat((grad[..., :first], turned, grad[..., last:]), dim=-1)


def table_gradients(
    grad: torch.Tensor,
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    rotation: Rotation,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of cos and sin: grad * x, grad * partners(x), summed where they broadcast."""
    layout = "half" if rotation.layout == "half" else "interleaved"
    columns = slice(rotation.start, rotation.start + rotation.dim)
    grad, x = grad[..., columns], x[..., columns].to(grad.dtype)
    by_column = (grad * x, grad * partners(x, layout))
    return (_summed(by_column[0], cos, rotation), _summed(by_column[1], sin, rotation))


def _summed(gradient: torch.Tensor, table: torch.Tensor, rotation: Rotation) -> torch.Tensor:
    if table.shape[-1] != rotation.dim:
        if rotation.layout == "half":
            gradient = gradient.reshape(*gradient.shape[:-1], 2, -1).sum(-2)
        else:
            gradient = gradient.reshape(*gradient.shape[:-1], -1, 2).sum(-1)
    return gradient.sum_to_size(table.shape).to(table.dtype)
