"""Plans, views and values that the kernel tests share."""

from __future__ import annotations

from dataclasses import replace

import torch

from normfuse.ops.residual_sum import Scales
from normfuse.ops.rounding import RoundingPlan

F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16

# Odd and tiny widths, heads, and a width just above a common multiple of 16.
WIDTHS = (1, 3, 64, 256, 769, 5377)


def random(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.randn(shape).to(dtype)


def integers(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    """Rows r of r and 7 r, half of each: mean of squares (5 r)^2, exact in any type and any order.

    So are their roots, even from torch's sqrt on a CPU, which is not always correctly rounded. The
    inverse roots 1 / (5 r) are not: what follows has to round, and every rounding can be told.
    """
    row = torch.arange(1, 1 + shape[0]).view(-1, *(1,) * (len(shape) - 1))
    values = torch.tensor([1, 7]).repeat(shape[-1] // 2)[torch.randperm(shape[-1])]
    return (values * torch.randint(0, 2, shape).mul(2).sub(1) * row).to(dtype)


# Rows of 64 elements.
VIEWS = {
    "contiguous": lambda: random(2, 3, 64),
    "sliced rows": lambda: random(6, 192)[:, 64:128],
    "misaligned": lambda: random(6, 65)[:, 1:],
    "heads first": lambda: random(2, 5, 3, 64).transpose(1, 2),
    "heads first, packed": lambda: random(2, 5, 9, 64)[:, :, 3:6].transpose(1, 2),
    "three strides": lambda: random(3, 4, 5, 64)[:, ::2, ::2],
    "four strides": lambda: random(2, 4, 4, 4, 64)[:, ::2, ::3, :2],
    "permuted": lambda: random(2, 3, 2, 64).permute(2, 0, 1, 3),
    "expanded": lambda: random(1, 3, 64).expand(4, 3, 64),
    "expanded inside": lambda: random(3, 1, 64).expand(3, 4, 64),
    "every second column": lambda: random(3, 128)[:, ::2],
    "columns first": lambda: random(64, 3).t(),
    "columns in the middle": lambda: random(2, 64, 3).transpose(1, 2),
    "one row": lambda: random(64),
    "sizes of one": lambda: random(3, 1, 1, 64).transpose(0, 1),
}

# Two operands of one shape, (2, 3, 5, 64), with layouts that do or do not agree.
PAIRS = {
    "both contiguous": lambda: (random(2, 3, 5, 64), random(2, 3, 5, 64)),
    "both heads first": lambda: (
        random(2, 5, 3, 64).transpose(1, 2),
        random(2, 5, 3, 64).transpose(1, 2),
    ),
    "x sliced": lambda: (random(2, 3, 5, 192)[..., :64], random(2, 3, 5, 64)),
    "residual sliced": lambda: (random(2, 3, 5, 64), random(2, 3, 5, 65)[..., 1:]),
    "both sliced": lambda: (random(2, 3, 5, 192)[..., :64], random(2, 3, 5, 192)[..., 64:128]),
    "x heads first": lambda: (random(2, 5, 3, 64).transpose(1, 2), random(2, 3, 5, 64)),
    "residual heads first": lambda: (random(2, 3, 5, 64), random(2, 5, 3, 64).transpose(1, 2)),
    "x packed heads": lambda: (
        random(2, 5, 9, 64)[:, :, 3:6].transpose(1, 2),
        random(2, 3, 5, 64),
    ),
    "residual expanded": lambda: (random(2, 3, 5, 64), random(1, 1, 5, 64).expand(2, 3, 5, 64)),
    "x expanded": lambda: (random(1, 3, 1, 64).expand(2, 3, 5, 64), random(2, 3, 5, 64)),
    "x columns first": lambda: (random(64, 2, 3, 5).permute(1, 2, 3, 0), random(2, 3, 5, 64)),
    "both columns first": lambda: (
        random(64, 2, 3, 5).permute(1, 2, 3, 0),
        random(64, 2, 3, 5).permute(1, 2, 3, 0),
    ),
}

# A tensor of no dimension holds a value of the activations' type: on a CPU, eager does not cast it
# to their type before it multiplies, as it does on CUDA.
SCALES = {
    "none": Scales(),
    "numbers": Scales(branch=0.22, total=1.3),
    "0-d tensors": Scales(torch.tensor(0.22).to(BF16), torch.tensor(1.3).to(BF16)),
    "1-d tensors": Scales(torch.tensor([0.22]).to(BF16), torch.tensor([1.3]).to(BF16)),
    "wide tensors": Scales(torch.tensor([0.22]), torch.tensor([1.3], dtype=F64)),
    "numbers and tensors": Scales(torch.tensor([0.22]), torch.tensor([1.3]), 0.7, 0.3),
}

# One norm each: where a type is narrower or wider than its neighbour, a rounding shows.
PLANS = (
    "f32 unit=f32>bf16 weight=bf16 out=bf16",  # Llama
    "f32 unit=f32 weight=f32 out=bf16",  # Gemma
    "f32 unit=f32>bf16 weight=f32 out=f32",  # a float32 weight in a bfloat16 model
    "f32 unit=f32>bf16 weight=f32 out=bf16",
    "f32 unit=f32>bf16 weight=f32>bf16 out=bf16",  # 1 + w in float32, then cast
    "f32 unit=f32>bf16>f32 weight=f32 out=bf16",
    "f32 unit=f32 weight=bf16>f32 out=bf16",  # 1 + w in bfloat16, then cast
    "f32 rstd=bf16 unit=f32 weight=f32 out=f32",
    "f32 rstd=bf16 unit=bf16 weight=bf16 out=bf16",
    "f32 divide_by_sqrt rstd=bf16 unit=bf16 weight=bf16 out=bf16",
    "bf16 unit=bf16 weight=bf16 out=bf16",
    "f16 unit=f16 weight=f16 out=f16",
    "f32 unit=f32>f16 weight=bf16 out=f32",
    "f64 unit=f64 weight=f64 out=f64",
    "f64 unit=f64 weight=f64 out=bf16",
    "f32 unit=f32>bf16 out=bf16",  # weightless
    "f32 unit=f32 out=bf16",
)


def llama(dtype: torch.dtype) -> RoundingPlan:
    """LlamaRMSNorm: rounded before the weight."""
    return RoundingPlan.before_weight(dtype, dtype)


def gemma(dtype: torch.dtype) -> RoundingPlan:
    """Gemma3RMSNorm: the weight, offset included, multiplies in float32."""
    return replace(RoundingPlan.once(dtype, dtype), weight=(F32, F32))


def changed(left: torch.Tensor, right: torch.Tensor) -> float:
    """The share of elements that differ."""
    assert (left.shape, left.dtype) == (right.shape, right.dtype)
    return (left != right).double().mean().item()


def assert_rounds_as_eager(result: torch.Tensor, eager: torch.Tensor) -> None:
    """A narrow result is eager's, but for the few elements whose last float32 bits round apart.

    The sums of squares and the exponentials differ in the last 8 units of float32 at most. Each
    such unit moves a value across a boundary of its type about once in 2^16 for bfloat16.
    """
    last_bits = 8 * torch.finfo(F32).eps / torch.finfo(result.dtype).eps
    share = changed(result, eager)
    assert share <= max(last_bits, 1.5 / result.numel()), f"{share:.2%} of the elements differ"


def assert_same_bits(results: tuple, eager: tuple) -> None:
    """Every result is eager's, element for element; a result that is None was not asked for."""
    for result, expected in zip(results, eager, strict=True):
        if result is not None:
            share = changed(result, expected)
            assert share == 0, f"{share:.2%} of the elements differ from eager's: {result}"


def layouts(tensors: tuple) -> list[tuple]:
    """Shape, type and strides of each."""
    return [(tuple(t.shape), t.dtype, t.stride()) for t in tensors]
