"""The kernel of the gradients of both dual ops, interpreted."""

from dataclasses import replace

import pytest
import torch

from normfuse.ops.dual_rms_norm_add_backward import (
    dual_rms_norm_add_backward_fake,
    dual_rms_norm_add_backward_reference,
    for_launch_of_dual,
)
from normfuse.ops.dual_rms_norm_add_rms_norm_backward import (
    dual_rms_norm_add_rms_norm_backward_fake,
    dual_rms_norm_add_rms_norm_backward_reference,
)
from normfuse.ops.rounding import RoundingPlan
from tests.kernels.backward import assert_errs_no_more_than, rstd_of
from tests.kernels.inputs import BF16, F16, F32, F64, PAIRS, SCALES, gemma, layouts, llama, random

STEM = "dual_rms_norm_add_backward"
COUNTS = pytest.mark.parametrize("count", [3, 4])  # the fourth norm is that of the sum
TILES = pytest.mark.parametrize("is_streamed", [True, False])


def arguments_of(
    count, x_1, x_2, *, grad_total="like x", scales=SCALES["none"], mask=None, plans=None
):
    """Those of the op of as many norms; each norm differs from the others."""
    dtype, width = x_1.dtype, x_1.shape[-1]
    plans = plans or [gemma(dtype), llama(dtype), gemma(dtype), llama(dtype)]
    weights = [random(width, dtype=dtype) for plan in plans[:count] if plan.weight]
    rstds = [rstd_of(x_1), rstd_of(x_2), rstd_of(random(*x_1.shape, dtype=dtype))]
    operands = (random(*x_1.shape, dtype=dtype), x_1, x_2)
    if count == 4:
        total = random(*x_1.shape, dtype=dtype)
        grad_total = operands[0] if grad_total is not None else None
        operands = (random(*x_1.shape, dtype=dtype), grad_total, x_1, x_2, total)
        rstds += [rstd_of(total)]
    numbers = ([1.0, 0.0, 0.5, 0.25][:count], [str(plan) for plan in plans[:count]])
    return *operands, weights, rstds, *scales, *numbers, dtype, mask or [True] * (3 + count)


def backward(launch, count, *tensors, tile=None, **settings):
    """The interpreted kernel's gradients, compared with those of the reference and of the fake."""
    arguments = arguments_of(count, *tensors, **settings)
    grads = launch(STEM, *for_launch_of_dual(arguments), **({"tile": tile} if tile else {}))
    reference = dual_rms_norm_add_backward_reference
    fake = dual_rms_norm_add_backward_fake
    if count == 4:
        reference = dual_rms_norm_add_rms_norm_backward_reference
        fake = dual_rms_norm_add_rms_norm_backward_fake
    assert_errs_no_more_than(reference, grads, *arguments)
    found, faked = ([g for g in gs if g is not None] for gs in (grads, fake(*arguments)))
    assert layouts(found) == layouts(faked)
    return grads


@pytest.mark.parametrize(("width", "count"), [(1, 3), (3, 4), (64, 3), (64, 4), (769, 4)])
def test_errs_no_more_than_the_reference(launch, width, count):
    backward(launch, count, random(3, width), random(3, width))


@pytest.mark.parametrize(("dtype", "width"), [(F16, 96), (F32, 1024)])
def test_other_types(launch, dtype, width):
    """In float32, wide enough that the largest errors are not a matter of chance."""
    backward(launch, 4, *(random(2, width, dtype=dtype) for _ in range(2)))


def test_mixed_types(launch):
    """The branch is rounded to the promoted type of the two norms."""
    plans = [RoundingPlan.once(F16, F16), RoundingPlan.once(F32, F16), RoundingPlan.once(F32, F16)]

    backward(launch, 3, random(7, 96, dtype=F16), random(7, 96, dtype=F32), plans=plans)


def test_float64_accumulates_in_float64(launch):
    plans = [RoundingPlan.once(F64, F64)] * 4
    arguments = arguments_of(4, *(random(7, 96, dtype=F64) for _ in range(2)), plans=plans)

    grads = launch(STEM, *for_launch_of_dual(arguments))

    expected = dual_rms_norm_add_rms_norm_backward_reference(*arguments)
    for grad, value in zip(grads, expected, strict=True):
        # Sums of up to 96 numbers, in two orders, three of them behind each other.
        assert (grad - value).abs().max() <= 3 * 96 * torch.finfo(F64).eps * value.abs().max()


@TILES
@pytest.mark.parametrize("root", ["reciprocal_sqrt", "divide_by_sqrt"])
def test_forms_the_branch_as_eager_did(launch, root, is_streamed, streamed):
    plans = [replace(gemma(BF16), root=root), RoundingPlan.once(BF16, None), gemma(BF16)]
    tile = streamed if is_streamed else None

    backward(launch, 3, random(2, 100), random(2, 100), plans=plans, tile=tile)


@COUNTS
def test_more_rows_than_programs(launch, count, few_programs):
    tile = few_programs(96, norms=count)

    backward(launch, count, random(31, 96), random(31, 96), tile=tile)


@COUNTS
@pytest.mark.parametrize("scales", SCALES)
def test_scales(launch, scales, count):
    backward(launch, count, random(5, 96), random(5, 96), scales=SCALES[scales])


@COUNTS
def test_adds_up_in_memory_what_is_too_wide_for_registers(launch, count, streamed):
    scales = SCALES["numbers and tensors"]

    backward(launch, count, random(2, 100), random(2, 100), scales=scales, tile=streamed)


@TILES
def test_a_total_that_nothing_else_reads(launch, is_streamed, streamed):
    tile = streamed if is_streamed else None

    backward(launch, 4, random(2, 100), random(2, 100), grad_total=None, tile=tile)


@pytest.mark.parametrize(
    "pair",
    ["both heads first", "x sliced", "residual expanded", "x columns first", "both columns first"],
)
def test_takes_rows_of_any_strides(launch, pair):
    backward(launch, 3, *PAIRS[pair]())


@TILES
@pytest.mark.parametrize(
    "mask",
    [
        [True, True, True, False, False, False, False],
        [False, False, False, True, True, True, True],
        [True, False, False, False, True, False, False],
    ],
)
def test_computes_only_what_is_wanted(launch, mask, is_streamed, streamed):
    tile = streamed if is_streamed else None

    grads = backward(launch, 4, random(2, 100), random(2, 100), mask=mask, tile=tile)

    assert [grad is not None for grad in grads] == mask


@COUNTS
def test_no_rows(launch, count):
    grads = backward(launch, count, random(0, 64), random(0, 64))

    assert not any(grad.any() for grad in grads)


def test_the_same_bits_twice(launch, few_programs):
    arguments = for_launch_of_dual(arguments_of(4, random(24, 96), random(24, 96)))
    tile = few_programs(96, norms=4)

    first, second = (launch(STEM, *arguments, tile=tile) for _ in range(2))

    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))
