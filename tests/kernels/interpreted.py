"""Kernels under Triton's interpreter, in a process of their own.

Triton decides at decoration whether a function is interpreted, its own `tl.sum` included, so a
process that interprets cannot compile for a GPU. The tests ask another process to launch; what they
import themselves stays as it is.
"""

from __future__ import annotations

import os
import sys
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from multiprocessing import get_context
from typing import Any

# Also lets tensors travel between processes with their strides.
import torch.multiprocessing


def start() -> ProcessPoolExecutor:
    """One process that interprets kernels."""
    return ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=_prepare)


def launch(stem: str, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
    """Runs in the other process: the launcher of the kernel file `stem`."""
    return import_module(f"normfuse.ops.kernels.{stem}").launch(*arguments, **keywords)


def run(module: str, kernel: str, grid: tuple[int, ...], arguments: dict[str, Any]) -> None:
    """Runs in the other process: one launch, which writes to memory that both processes share."""
    getattr(import_module(module), kernel)[grid](**arguments)


def kernel_form(name: str, arguments: tuple[Any, ...], wrap: Any = None) -> list[Any]:
    """Runs in the other process: all results of an op's Triton form."""
    from normfuse.ops import lowering
    from normfuse.ops.kernels.tile import eager

    op = getattr(torch.ops.normfuse, name).default
    used = (True,) * len(lowering.inline_form(op)(*arguments))
    return list(lowering.kernel_form(op, used, wrap or eager)(*arguments))


def _prepare() -> None:
    assert "triton" not in sys.modules, "triton must be imported after the switch"
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)
    # Fills every `torch.empty` with NaN: an element that a kernel leaves out shows.
    torch.use_deterministic_algorithms(True)
    _round_to_nearest()
    _sum_in_pairs()


def _round_to_nearest() -> None:
    """The interpreter of triton 3.7.1 truncates to bfloat16; every GPU rounds to nearest even."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    dtypes = {
        tl.bfloat16: torch.bfloat16,
        tl.float16: torch.float16,
        tl.float32: torch.float32,
        tl.float64: torch.float64,
    }
    cast_impl = InterpreterBuilder.cast_impl

    def cast(self: Any, source: Any, target: Any) -> Any:
        old, new = source.dtype.scalar, target.scalar
        if old == new or tl.bfloat16 not in (old, new):
            return cast_impl(self, source, target)
        values = torch.from_numpy(source.data.copy())
        values = (values.view(torch.bfloat16) if old == tl.bfloat16 else values).to(dtypes[new])
        values = values.view(torch.uint16) if new == tl.bfloat16 else values
        return TensorHandle(values.numpy(), new)

    InterpreterBuilder.cast_impl = cast


def _sum_in_pairs() -> None:
    """The interpreter adds one after the other along any axis but the last; a GPU adds a tree."""
    import numpy
    from triton.runtime.interpreter import ReduceOps

    def total(self: Any, operand: Any) -> Any:
        values = numpy.ascontiguousarray(numpy.moveaxis(operand.handle.data, self.axis, -1))
        result = values.sum(-1)
        if self.keep_dims:
            result = numpy.expand_dims(result, self.axis)
        return self.to_tensor(result, operand.dtype)

    ReduceOps.sum = total
