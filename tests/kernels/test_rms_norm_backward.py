"""The kernel of `rms_norm_backward`, also with a sum before or after the norm, interpreted."""

from dataclasses import replace

import pytest
import torch

from normfuse.ops.add_rms_norm_backward import (
    add_rms_norm_backward_fake,
    add_rms_norm_backward_reference,
)
from normfuse.ops.rms_norm_add_backward import (
    rms_norm_add_backward_fake,
    rms_norm_add_backward_reference,
)
from normfuse.ops.rms_norm_backward import rms_norm_backward_fake, rms_norm_backward_reference
from normfuse.ops.rounding import RoundingPlan
from tests.kernels.backward import assert_errs_no_more_than, rstd_of
from tests.kernels.inputs import (
    BF16,
    F16,
    F32,
    F64,
    PAIRS,
    SCALES,
    VIEWS,
    WIDTHS,
    gemma,
    layouts,
    llama,
    random,
)

PLAN = str(llama(BF16))
DTYPES = pytest.mark.parametrize(
    ("grad", "x", "weight"),
    [(F32, F32, F32), (F16, F16, F16), (BF16, F32, BF16), (F32, BF16, F64)],
)


def backward(launch, *arguments, mask=(True, True), plan=PLAN, **settings):
    """The interpreted kernel's gradients, compared with those of the reference."""
    steps = RoundingPlan.parse(plan)
    grads = launch("rms_norm_backward", *arguments, steps, mask, **settings)
    assert_errs_no_more_than(rms_norm_backward_reference, grads, *arguments, plan, mask)
    return grads


@pytest.mark.parametrize("width", WIDTHS)
def test_errs_no_more_than_the_reference(launch, width):
    x = random(5, width)

    backward(launch, random(5, width), x, random(width), rstd_of(x), 1.0)


@DTYPES
def test_mixed_types(launch, grad, x, weight):
    x, plan = random(7, 96, dtype=x), RoundingPlan.once(x, weight)

    backward(
        launch, random(7, 96, dtype=grad), x, random(96, dtype=weight), rstd_of(x), 0.0,
        plan=str(plan),
    )  # fmt: skip


def test_float64_accumulates_in_float64(launch):
    tensors = [random(*shape, dtype=F64) for shape in ((7, 96), (7, 96), (96,))]
    plan = RoundingPlan.once(F64, F64)

    grads = launch("rms_norm_backward", *tensors, rstd_of(tensors[1]), 0.1, plan, (True, True))

    expected = rms_norm_backward_reference(
        *tensors, rstd_of(tensors[1]), 0.1, str(plan), (True, True)
    )
    for grad, value in zip(grads, expected, strict=True):
        # Sums of up to 96 numbers, in two orders: each addition may round.
        assert (grad - value).abs().max() <= 96 * torch.finfo(F64).eps * value.abs().max()


@pytest.mark.parametrize("width", [64, 5377])
def test_more_rows_than_programs(launch, width, few_programs):
    x = random(23, width)

    backward(launch, random(23, width), x, random(width), rstd_of(x), 1.0, tile=few_programs(width))


def test_two_wide_rows_at_once(launch, few_programs):
    x, width = random(23, 1100), 1100
    tile = few_programs(width)
    tile = replace(tile, rows=2, num_warps=2 * tile.num_warps)

    backward(launch, random(23, width), x, random(width), rstd_of(x), 1.0, tile=tile)


@pytest.mark.parametrize("view", VIEWS)
def test_takes_rows_of_any_strides(launch, view):
    x, weight = VIEWS[view](), random(64)
    arguments = (VIEWS[view](), x, weight, rstd_of(x), 0.0)

    grads = backward(launch, *arguments)

    assert layouts(grads) == layouts(rms_norm_backward_fake(*arguments, PLAN, (True, True)))


def test_a_gradient_of_one_number_for_all(launch):
    x = random(3, 4, 64)

    backward(launch, random(1).expand(3, 4, 64), x, random(64), rstd_of(x), 0.0)


@pytest.mark.parametrize("shape", [(0, 64), (2, 0, 3, 64)])
def test_no_rows(launch, shape):
    x = random(*shape)

    grad_x, grad_weight = backward(launch, x, x, random(64), rstd_of(x), 0.0)

    assert grad_x.shape == shape
    assert not grad_weight.any()


@pytest.mark.parametrize("mask", [(True, False), (False, True)])
def test_computes_only_what_is_wanted(launch, mask):
    x = random(6, 96)

    grads = backward(launch, random(6, 96), x, random(96), rstd_of(x), 0.0, mask=mask)

    assert tuple(grad is not None for grad in grads) == mask


def test_without_a_weight(launch):
    x = random(6, 96)

    backward(launch, random(6, 96), x, None, rstd_of(x), 0.0, mask=(True, False))


def test_of_an_l2_norm(launch):
    x, plan = random(6, 96), RoundingPlan.once(BF16, None).with_mean("sum")
    rstd = (x.float().square().sum(-1, keepdim=True) + 1e-6).rsqrt()

    backward(launch, random(6, 96), x, None, rstd, 0.0, mask=(True, False), plan=str(plan))


def test_adds_up_in_memory_what_is_too_wide_for_registers(launch, streamed):
    x = random(7, 100)

    backward(launch, random(7, 100), x, random(100), rstd_of(x), 1.0, tile=streamed)


def test_a_row_wider_than_the_registers(launch):
    x = random(2, 12289)

    backward(launch, random(2, 12289), x, random(12289), rstd_of(x), 1.0)


def test_a_weight_of_any_stride(launch):
    x = random(5, 64)

    backward(launch, random(5, 64), x, random(64, 2)[:, 0], rstd_of(x), 0.0)


def add_backward(launch, *arguments, dtypes=(BF16, BF16), mask=(True, False, True), **settings):
    steps = RoundingPlan.parse(PLAN)
    *tensors, scales, offset = arguments
    grads = launch(
        "add_rms_norm_backward", *tensors, scales, offset, steps, dtypes, mask, **settings
    )
    norm = (*scales, offset, PLAN, *dtypes, mask)
    assert_errs_no_more_than(add_rms_norm_backward_reference, grads, *tensors, *norm)
    return grads


@pytest.mark.parametrize("has_own", [True, False])
@pytest.mark.parametrize("is_streamed", [True, False])
def test_the_gradient_of_a_first_sum_is_added(launch, has_own, is_streamed, streamed):
    total, grad_total = random(5, 96), random(5, 96) if has_own else None
    tile = {"tile": streamed} if is_streamed else {}

    add_backward(
        launch, random(5, 96), grad_total, total, random(96), rstd_of(total), SCALES["none"], 1.0,
        **tile,
    )  # fmt: skip


@pytest.mark.parametrize("scales", SCALES)
def test_scales_of_a_first_sum(launch, scales):
    total, factors = random(5, 96), SCALES[scales]
    tensors = (random(5, 96), random(5, 96), total, random(96), rstd_of(total))

    add_backward(launch, *tensors, factors, 0.0, dtypes=(BF16, F32), mask=(True, True, True))


@pytest.mark.parametrize("pair", PAIRS)
def test_a_first_sum_of_any_strides(launch, pair):
    total, grad_total = PAIRS[pair]()
    tensors = (random(*total.shape), grad_total, total, random(64), rstd_of(total))

    grads = add_backward(launch, *tensors, SCALES["none"], 0.0)

    dtypes = (BF16, BF16, (True, False, True))
    fakes = add_rms_norm_backward_fake(*tensors, *SCALES["none"], 0.0, PLAN, *dtypes)
    assert layouts((grads[0], grads[2])) == layouts((fakes[0], fakes[2]))


@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize("is_streamed", [True, False])
def test_scales_of_a_last_sum(launch, scales, is_streamed, streamed):
    x, factors, mask = random(5, 96), SCALES[scales], (True, True, True)
    tensors = (random(5, 96), x, random(96), rstd_of(x))
    tile = {"tile": streamed} if is_streamed else {}

    grads = launch("rms_norm_add_backward", *tensors, factors, 1.0, llama(BF16), F32, mask, **tile)

    norm = (*factors, 1.0, PLAN, F32, mask)
    assert_errs_no_more_than(rms_norm_add_backward_reference, grads, *tensors, *norm)
    assert layouts(grads) == layouts(rms_norm_add_backward_fake(*tensors, *norm))


def test_the_same_bits_twice(launch):
    x = random(300, 96)
    arguments = (random(300, 96), x, random(96), rstd_of(x), 1.0, gemma(BF16), (True, True))

    first, second = (launch("rms_norm_backward", *arguments) for _ in range(2))

    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))
