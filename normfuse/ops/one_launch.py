"""What norms that stand side by side must be for one launch of a kernel, forward or backward."""

from __future__ import annotations

from collections.abc import Sequence

import torch

MAX_NORMS = 3
MAX_WIDTH = 16384
MAX_DIMS = 4


def obstacle_to_one_launch(xs: Sequence[torch.Tensor]) -> str | None:
    """Why the kernel cannot take these tensors, as a sentence; None if it can."""
    if len(xs) > MAX_NORMS:
        return f"one launch takes up to {MAX_NORMS} tensors, not {len(xs)}"
    for x in xs:
        if x.shape[-1] > MAX_WIDTH:
            return f"a row of {x.shape[-1]} is wider than the {MAX_WIDTH} that a program holds"
        if x.dim() > MAX_DIMS:
            return f"a tensor of {x.dim()} dimensions has more than the {MAX_DIMS} of the kernel"
    return None
