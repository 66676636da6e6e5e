"""Where a launch writes its results, if not into memory of their own.

A key that attention reads goes into a cache at the positions of its tokens, or is repeated for the
queries that share it: copies that would each be a launch more, and that a kernel can make while it
holds the row. The same holds for a value, which nobody normalises or turns: it joins the launch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

if TYPE_CHECKING:
    from normfuse.ops.kernels.rows import Layout


class Cached(NamedTuple):
    """Into a cache: `memory.index_put([..., positions, ...], result.permute(dims))`.

    Attributes:
        memory: the cache; its columns, the last axis, lie side by side.
        positions: (T,), or a single one that the others follow.
        dims: how the result is permuted, its columns last.
        axis: of the cache, where the positions are.
        counts_up: whether `positions` is that of the first row, and the others follow it.
        kept: whether the result is wanted in memory of its own, too.
    """

    memory: Any
    positions: Any
    dims: tuple[int, ...]
    axis: int
    counts_up: bool
    kept: bool = False

    def layout(self, x: torch.Tensor, dtype: torch.dtype) -> Layout:
        """Where the rows of a result as large as x lie; `dtype` is that of the cache."""
        from normfuse.ops.kernels.rows import Layout

        assert dtype == self.memory.dtype
        strides: list[Any] = [0] * x.dim()
        for axis, dim in enumerate(self.dims):
            strides[dim] = 0 if axis == self.axis else self.memory.stride(axis)
        placed = self.memory.shape[self.axis], self.memory.stride(self.axis)
        where = self.positions, self.counts_up
        return Layout(self.memory, tuple(strides[:-1]), self.dims[self.axis], *placed, *where)


class Repeated(NamedTuple):
    """A new tensor: `result.permute(dims).unsqueeze(axis)`, expanded there, contiguous.

    Attributes:
        dims: how the result is permuted, its columns last.
        axis: the new one.
        copies: its size.
        kept: whether the result is wanted in memory of its own, too.
    """

    dims: tuple[int, ...]
    axis: int
    copies: int
    kept: bool = False

    def layout(self, x: torch.Tensor, dtype: torch.dtype) -> Layout:
        """Where the rows of a result of type `dtype` that is as large as x lie."""
        from normfuse.ops.kernels.rows import Layout

        shape = [x.shape[dim] for dim in self.dims]
        shape.insert(self.axis, self.copies)
        memory = torch.empty(shape, dtype=dtype, device=x.device)
        strides: list[Any] = [0] * x.dim()
        for axis, dim in enumerate(self.dims):
            strides[dim] = memory.stride(axis + (axis >= self.axis))
        copies = self.copies, memory.stride(self.axis)
        return Layout(memory, tuple(strides[:-1]), copies=copies[0], copy_stride=copies[1])


Destination = Cached | Repeated


class Writes(NamedTuple):
    """What a launch writes elsewhere than into memory of its own.

    It returns the memory of each behind the results of the op, in this order.

    Attributes:
        results: for each result of the op its destination, or None.
        others: tensors that only join the launch, each with its destination.
    """

    results: tuple[Destination | None, ...]
    others: tuple[tuple[Any, Destination], ...] = ()
