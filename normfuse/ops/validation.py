"""What the public functions refuse, with what must hold, what came and what to do."""

from __future__ import annotations

import torch

from normfuse.ops.rounding import FLOATS


def check_activation(name: str, value: torch.Tensor) -> None:
    """`value` must be a floating-point tensor whose last dimension exists and is not empty."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}: pass a torch.Tensor")
    if value.dtype not in FLOATS:
        names = ", ".join(str(dtype) for dtype in FLOATS)
        raise TypeError(f"{name} must have one of the types {names}, got {value.dtype}: cast it")
    if value.dim() == 0:
        raise ValueError(
            f"{name} must have at least one dimension, got a 0-d tensor: "
            "the norm is taken over the last dimension"
        )
    if value.shape[-1] == 0:
        raise ValueError(
            f"{name} must have a last dimension of at least 1, got shape {tuple(value.shape)}: "
            "the mean of no values is undefined"
        )


def check_weight(name: str, weight: torch.Tensor | None, x: torch.Tensor) -> None:
    """`weight` must be None or a vector over the last axis of `x`, on the same device."""
    if weight is None:
        return
    check_activation(name, weight)
    if weight.shape != x.shape[-1:]:
        raise ValueError(
            f"{name} must have shape ({x.shape[-1]},), got {tuple(weight.shape)}: "
            "pass the weight of the normalised axis"
        )
    check_device(name, weight, x)


def check_weight_of_heads(name: str, weight: torch.Tensor | None, x: torch.Tensor) -> None:
    """`weight` must be as in `check_weight`, or (H, 1, ..., N) for an x of (..., H, ..., N)."""
    if weight is None or weight.dim() == 1:
        check_weight(name, weight, x)
        return
    check_activation(name, weight)
    fits = 2 <= weight.dim() <= x.dim() and weight.shape[-1] == x.shape[-1]
    if not fits or weight.shape[0] != x.shape[-weight.dim()] or set(weight.shape[1:-1]) - {1}:
        raise ValueError(
            f"{name} must have shape ({x.shape[-1]},), or (H, 1, ..., {x.shape[-1]}) with the H "
            f"heads of {tuple(x.shape)}, got {tuple(weight.shape)}: view the weight of a whole "
            "projection as its heads, whose axis comes first"
        )
    check_device(name, weight, x)


def check_residual(
    residual: torch.Tensor, x: torch.Tensor, name: str = "residual", other: str = "x"
) -> None:
    """`residual` must be a floating tensor of the shape and device of `x`."""
    check_like(name, residual, x, other)


def check_like(name: str, value: torch.Tensor, x: torch.Tensor, other: str = "x") -> None:
    """`value` must be a floating tensor of the shape and device of `x`, called `other`."""
    check_activation(name, value)
    if value.shape != x.shape:
        raise ValueError(
            f"{name} must have the shape of {other}, {tuple(x.shape)}, got {tuple(value.shape)}: "
            "expand it before the call"
        )
    check_device(name, value, x)


def check_broadcast(name: str, value: torch.Tensor, x: torch.Tensor) -> None:
    """`value` must have the columns of `x`, broadcast to its rows, and be on its device."""
    check_activation(name, value)
    fits = value.dim() <= x.dim() and value.shape[-1] == x.shape[-1]
    leading = zip(reversed(value.shape[:-1]), reversed(x.shape[:-1]), strict=False)
    if not fits or any(size not in (1, rows) for size, rows in leading):
        raise ValueError(
            f"{name} must have the columns of x, {tuple(x.shape)}, and broadcast over its rows, "
            f"got {tuple(value.shape)}: add dimensions of size 1 where it broadcasts"
        )
    check_device(name, value, x)


def check_groups(groups: int, x: torch.Tensor) -> None:
    """`groups` must divide the last axis of `x`."""
    if not isinstance(groups, int) or groups < 1 or x.shape[-1] % groups:
        raise ValueError(
            f"groups must divide the last dimension of x, {x.shape[-1]}, got {groups}: "
            "pass the number of groups, not their size"
        )


def check_scale(name: str, scale: float | torch.Tensor | None, x: torch.Tensor) -> None:
    """`scale` must be None, a number, or a floating tensor of one element on the device of `x`."""
    if scale is None or isinstance(scale, (int, float, torch.SymFloat)):
        return
    if not isinstance(scale, torch.Tensor) or scale.dtype not in FLOATS:
        came = scale.dtype if isinstance(scale, torch.Tensor) else type(scale).__name__
        raise TypeError(f"{name} must be a number or a floating-point tensor, got {came}: cast it")
    if scale.numel() != 1 or scale.dim() > 1:
        raise ValueError(
            f"{name} must have shape () or (1,), got {tuple(scale.shape)}: "
            "pass one factor for all rows"
        )
    check_device(name, scale, x)


def check_device(name: str, value: torch.Tensor, x: torch.Tensor) -> None:
    """`value` must lie on the device of `x`."""
    if value.device != x.device:
        raise ValueError(
            f"{name} must be on the device of x, {x.device}, got {value.device}: move it there"
        )


def check_eps(name: str, eps: float | torch.Tensor) -> None:
    """`eps` must be a number that is not negative."""
    if isinstance(eps, torch.SymFloat):
        return
    if not isinstance(eps, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(eps).__name__}: pass a float")
    if not eps >= 0:
        raise ValueError(f"{name} must be at least 0, got {eps}: pass the eps of the model's norm")


def check_table(name: str, table: torch.Tensor, of: str, x: torch.Tensor, dim: int) -> None:
    """`table` must hold the angles of `dim` columns of `x`, named `of`, and broadcast against it"""
    check_activation(name, table)
    if not 2 <= dim <= x.shape[-1] or dim % 2:
        raise ValueError(
            f"rotary_dim must be even, from 2 to the last dimension of {of}, {x.shape[-1]}, got "
            f"{dim}: pass how many columns turn"
        )
    if table.shape[-1] not in (dim, dim // 2) or not _broadcasts(table.shape[:-1], x.shape[:-1]):
        raise ValueError(
            f"{name} must broadcast against {of} {tuple(x.shape)} with {dim} or {dim // 2} "
            f"columns, got {tuple(table.shape)}: unsqueeze the axis of the heads"
        )
    check_device(name, table, x)


def _broadcasts(shape: torch.Size, target: torch.Size) -> bool:
    pairs = zip(reversed(shape), reversed(target), strict=False)
    return len(shape) <= len(target) and all(a in (1, b) for a, b in pairs)
