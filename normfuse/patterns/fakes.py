"""Fake tensors made from what is known of them, without running an operation.

A pass must say for each node that it inserts what tracing would have recorded there. An operation
on fakes takes about 300 us to say it, and a tensor made here about 30 (torch 2.13, static sizes).
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch._subclasses.fake_tensor import FakeTensor, in_kernel_invocation_manager


def fake_like(
    like: torch.Tensor, storage: torch.UntypedStorage | None = None, offset: int | torch.SymInt = 0
) -> FakeTensor:
    """A fake tensor of the same type, device, sizes and strides as `like`.

    Args:
        like: a fake tensor.
        storage: the memory that it is a view of; None gives it its own, so that it has no alias.
        offset: where in that storage it begins, in elements.
    """
    assert isinstance(like, FakeTensor), f"got {type(like).__name__}, expected a fake tensor"
    mode = like.fake_mode
    shape, stride = like.shape, like.stride()
    unguarded = mode.shape_env.suppress_guards() if mode.shape_env else nullcontext()
    with in_kernel_invocation_manager(mode), unguarded, torch.no_grad():
        meta = torch.empty_strided(shape, stride, dtype=like.dtype, device="meta")
        if storage is not None:
            meta.set_(storage, offset, shape, stride)
    return FakeTensor(mode, meta, like.device)
