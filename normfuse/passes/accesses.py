"""Which tensors our kernels read and write, as torch finds out, once for all launches alike.

Inductor asks for every launch of a kernel that is not its own, twice, and torch generates the
kernel's TTIR each time, which takes tens of milliseconds. The answer depends on the kernel, its
constants and the types of its arguments alone, so it is kept for launches of our kernels that agree
in them. Kernels of others are asked about as before.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch._higher_order_ops import triton_kernel_wrap

# Its name in torch 2.13, and before.
ANALYSES = ("identify_accessed_tensors", "identify_mutated_tensors")
KERNELS = "normfuse.ops.kernels."

_known: dict[Hashable, Any] = {}


def remember_accesses() -> None:
    """Puts the memory in front of torch's analysis; where torch has none, nothing happens."""
    for name in ANALYSES:
        analysis = getattr(triton_kernel_wrap, name, None)
        if analysis is not None and not hasattr(analysis, "__wrapped__"):
            setattr(triton_kernel_wrap, name, _remembering(analysis))


def _remembering(analysis: Callable[..., Any]) -> Callable[..., Any]:
    def remembered(kernel: Any, kwargs: dict[str, Any], tma_descriptor_metadata: Any) -> Any:
        function, constants = _parts(kernel)
        if tma_descriptor_metadata or not _is_ours(function):
            return analysis(kernel, kwargs, tma_descriptor_metadata)
        arguments = {**kwargs, **constants}
        key = (function, tuple((name, _kind(arguments[name])) for name in sorted(arguments)))
        if key not in _known:
            _known[key] = analysis(kernel, kwargs, tma_descriptor_metadata)
        return copy.deepcopy(_known[key])  # Inductor may rename what is its own

    remembered.__wrapped__ = analysis  # type: ignore[attr-defined]
    return remembered


def _is_ours(function: Any) -> bool:
    return str(getattr(function, "__module__", None)).startswith(KERNELS)


def _parts(kernel: Any) -> tuple[Any, dict[str, Any]]:
    """A kernel without the configuration that torch puts around it, and that configuration."""
    configs = getattr(kernel, "configs", None)
    return (kernel, {}) if configs is None else (kernel.fn, configs[0].kwargs if configs else {})


def _kind(value: Any) -> Hashable:
    """All that the analysis looks at in an argument: the type of a tensor, the value of a number.

    Torch puts the same number in the place of every symbol.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return type(value), value
    if isinstance(value, torch.Tensor):
        return "tensor", value.dtype
    if hasattr(value, "get_dtype"):  # Inductor's
        return "tensor", value.get_dtype()
    return ("symbol",)
