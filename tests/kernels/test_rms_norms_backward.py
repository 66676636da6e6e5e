"""The kernel of `rms_norms_backward`, interpreted."""

import pytest
import torch

from normfuse.ops.rms_norms_backward import (
    for_launch_of_norms,
    rms_norms_backward_fake,
    rms_norms_backward_reference,
)
from normfuse.ops.rounding import RoundingPlan
from tests.kernels.backward import assert_errs_no_more_than, rstd_of
from tests.kernels.inputs import BF16, F16, F32, F64, VIEWS, gemma, layouts, random

STEM = "rms_norms_backward"
GEMMA, ROUTER = str(gemma(BF16)), str(RoundingPlan.once(BF16, None))
TILES = pytest.mark.parametrize("is_streamed", [True, False])


def operands(x, grads=3, dtype=BF16):
    """As in Gemma 4: a weight, none behind which a number scales, a weight."""
    weights = [random(x.shape[-1], dtype=dtype) for _ in range(2)]
    return x, [random(*x.shape, dtype=dtype) for _ in range(grads)], weights, rstd_of(x)


NORMS = ([1.0, 0.0, 0.5], [1.0, 0.3, 1.0], [GEMMA, ROUTER, GEMMA])


def backward(launch, *arguments, **settings):
    """The interpreted kernel's gradients, compared with those of the reference and of the fake."""
    grads = launch(STEM, *for_launch_of_norms(arguments), **settings)
    assert_errs_no_more_than(rms_norms_backward_reference, grads, *arguments)
    assert layouts(grads) == layouts(rms_norms_backward_fake(*arguments))
    return grads


@pytest.mark.parametrize("width", [1, 3, 64, 769])
def test_errs_no_more_than_the_reference(launch, width):
    backward(launch, *operands(random(3, width)), *NORMS, [True] * 3)


@pytest.mark.parametrize(("dtype", "width"), [(F16, 96), (F32, 1024)])
def test_other_types(launch, dtype, width):
    """In float32, wide enough that the largest errors are not a matter of chance."""
    x = random(2, width, dtype=dtype)

    backward(launch, *operands(x, dtype=dtype), *NORMS, [True] * 3)


def test_mixed_types(launch):
    x, grads = random(7, 96), [random(7, 96, dtype=dtype) for dtype in (BF16, F32, F16)]
    weights = [random(96, dtype=dtype) for dtype in (F32, F64)]

    backward(launch, x, grads, weights, rstd_of(x), *NORMS, [True] * 3)


@pytest.mark.parametrize("count", [1, 2, 4])
@TILES
def test_any_number_of_norms(launch, count, is_streamed, streamed):
    x, tile = random(2, 100), {"tile": streamed} if is_streamed else {}
    grads, weights = ([random(*shape) for _ in range(count)] for shape in ((2, 100), (100,)))
    numbers = ([1.0, 0.0, 0.5, 0.25][:count], [1.0, 0.7, 0.3, 1.0][:count], [GEMMA] * count)

    backward(launch, x, grads, weights, rstd_of(x), *numbers, [True] * (count + 1), **tile)


def test_more_rows_than_programs(launch, few_programs):
    backward(launch, *operands(random(31, 96)), *NORMS, [True] * 3, tile=few_programs(96, norms=3))


@pytest.mark.parametrize(
    "view", ["misaligned", "heads first", "four strides", "expanded", "columns first", "one row"]
)
def test_takes_rows_of_any_strides(launch, view):
    x, grads, weights, rstd = operands(VIEWS[view]())
    grads[1] = VIEWS[view]()

    backward(launch, x, grads, weights, rstd, *NORMS, [True] * 3)


@pytest.mark.parametrize(
    "mask",
    [[True, False, False], [False, True, True], [True, True, False]],
)
@TILES
def test_computes_only_what_is_wanted(launch, mask, is_streamed, streamed):
    tile = {"tile": streamed} if is_streamed else {}

    grads = backward(launch, *operands(random(2, 100)), *NORMS, mask, **tile)

    assert len(grads) == sum(mask)


def test_of_l2_norms(launch):
    plan = str(RoundingPlan.once(BF16, None).with_mean("sum"))
    x, grads, _, _ = operands(random(6, 96), grads=2)
    rstd = (x.float().square().sum(-1, keepdim=True) + 1e-6).rsqrt()

    backward(launch, x, grads, [], rstd, [0.0] * 2, [1.0, 0.5], [plan] * 2, [True])


def test_no_rows(launch):
    grads = backward(launch, *operands(random(0, 64)), *NORMS, [True] * 3)

    assert not any(grad.any() for grad in grads)


def test_the_same_bits_twice(launch, few_programs):
    arguments = for_launch_of_norms((*operands(random(24, 96)), *NORMS, [True] * 3))
    tile = few_programs(96, norms=3)

    first, second = (launch(STEM, *arguments, tile=tile) for _ in range(2))

    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))
