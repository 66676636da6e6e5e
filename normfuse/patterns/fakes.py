"""Fake tensors made from what is known of them, without running an operation.

A pass must say for each node that it inserts what tracing would have recorded there. An operation
on fakes takes about 300 us to say it, and a tensor made here about 30 (torch 2.13, static sizes).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager


def fake_like(
    like: torch.Tensor,
    storage: torch.UntypedStorage | None = None,
    offset: int | torch.SymInt = 0,
    dtype: torch.dtype | None = None,
) -> FakeTensor:
    """A fake tensor of the same device, sizes and strides as `like`.

    Args:
        like: a fake tensor.
        storage: the memory that it is a view of; None gives it its own, so that it has no alias.
        offset: where in that storage it begins, in elements.
        dtype: its type; None takes that of `like`.
    """
    shape, stride = like.shape, like.stride()
    with _meta_kernels(like):
        meta = torch.empty_strided(shape, stride, dtype=dtype or like.dtype, device="meta")
        if storage is not None:
            meta.set_(storage, offset, shape, stride)
    return _fake(like, meta)


def fake_empty(like: torch.Tensor, shape: Sequence[Any], dtype: torch.dtype) -> FakeTensor:
    """What `like.new_empty(shape, dtype=dtype)` records: a contiguous tensor on the same device."""
    with _meta_kernels(like):
        meta = torch.empty(shape, dtype=dtype, device="meta")
    return _fake(like, meta)


def fake_empty_like(like: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What `torch.empty_like(like, dtype=dtype)` records: the order of axes of `like`, no gaps."""
    if all(isinstance(size, int) for size in like.shape) and like.is_contiguous():
        return fake_like(like, dtype=dtype)
    with _mode_of(like):
        return torch.empty_like(like, dtype=dtype)


def _mode_of(like: torch.Tensor) -> FakeTensorMode:
    assert isinstance(like, FakeTensor), f"got {type(like).__name__}, expected a fake tensor"
    return like.fake_mode


@contextmanager
def _meta_kernels(like: torch.Tensor) -> Iterator[None]:
    """As torch runs a kernel for fakes: what is made is a plain tensor on the device "meta"."""
    mode = _mode_of(like)
    unguarded = mode.shape_env.suppress_guards() if mode.shape_env else nullcontext()
    with in_kernel_invocation_manager(mode), unguarded, torch.no_grad():
        yield


def _fake(like: torch.Tensor, meta: torch.Tensor) -> FakeTensor:
    return FakeTensor(_mode_of(like), meta, like.device)
