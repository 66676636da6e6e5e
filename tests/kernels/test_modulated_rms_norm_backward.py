"""The kernels of `modulated_rms_norm_backward`, interpreted."""

from dataclasses import replace

import pytest
import torch

from normfuse.ops.modulated_rms_norm_backward import (
    modulated_rms_norm_backward_fake,
    modulated_rms_norm_backward_reference,
)
from normfuse.ops.rounding import RoundingPlan
from tests.kernels.backward import assert_errs_no_more_than, rstd_of
from tests.kernels.inputs import BF16, F16, F32, F64, VIEWS, layouts, llama, random
from tests.kernels.test_modulated_rms_norm import MODULATORS

PLAN = str(llama(BF16))
EVERY = (True,) * 4


def with_rstd(grad_y, x, scale, shift, weight, offset, scale_offset):
    """The op's arguments up to the plan."""
    return grad_y, x, scale, shift, weight, rstd_of(x).contiguous(), offset, scale_offset


def backward(launch, *arguments, mask=EVERY, plan=PLAN, **settings):
    """The interpreted kernels' gradients, compared with those of the reference."""
    arguments = with_rstd(*arguments)
    grads = launch(
        "modulated_rms_norm_backward", *arguments, RoundingPlan.parse(plan), mask, **settings
    )
    assert_errs_no_more_than(modulated_rms_norm_backward_reference, grads, *arguments, plan, mask)
    fakes = modulated_rms_norm_backward_fake(*arguments, plan, mask)
    present = [(grad, fake) for grad, fake in zip(grads, fakes, strict=True) if grad is not None]
    assert all(layouts((grad,)) == layouts((fake,)) for grad, fake in present)
    return grads


@pytest.mark.parametrize("width", [1, 64, 769, 5377])
@pytest.mark.parametrize("rows", [(2, 1), (2, 3)], ids=["a sequence", "a row"])
def test_errs_no_more_than_the_reference(launch, rows, width):
    scale, shift = random(*rows, width), random(*rows, width)

    backward(
        launch, random(2, 3, width), random(2, 3, width), scale, shift, random(width), 1.0, 1.0
    )


# Each shape beside itself and beside another.
@pytest.mark.parametrize("step", [0, 3])
@pytest.mark.parametrize("scale", MODULATORS)
def test_scale_and_shift_broadcast_each_in_its_own_way(launch, scale, step, few_programs):
    rows, names = (random(2, 3, 5, 64), random(2, 3, 5, 64)), list(MODULATORS)
    shift = names[(names.index(scale) + step) % len(names)]
    operands = (*rows, MODULATORS[scale](), MODULATORS[shift](), random(64))

    backward(launch, *operands, 0.0, 1.0, tile=replace(few_programs(64), rows=2))


@pytest.mark.parametrize(
    ("grad", "x", "scale", "weight"),
    [(F32, F32, F32, F32), (F16, F16, F16, F16), (BF16, F32, BF16, BF16), (F32, BF16, F32, F64)],
)
def test_mixed_types(launch, grad, x, scale, weight):
    rows = random(2, 33, 96, dtype=grad), random(2, 33, 96, dtype=x)
    modulators = random(2, 1, 96, dtype=scale), random(96, dtype=x)
    plan = str(RoundingPlan.once(x, weight))

    backward(launch, *rows, *modulators, random(96, dtype=weight), 0.0, 1.0, plan=plan)


def test_float64_accumulates_in_float64(launch):
    shapes = ((2, 7, 96), (2, 7, 96), (2, 1, 96), (96,), (96,))
    arguments = with_rstd(*(random(*shape, dtype=F64) for shape in shapes), 0.1, 1.0)
    plan = RoundingPlan.once(F64, F64)

    grads = launch("modulated_rms_norm_backward", *arguments, plan, EVERY)

    expected = modulated_rms_norm_backward_reference(*arguments, str(plan), EVERY)
    for grad, value in zip(grads, expected, strict=True):
        # Sums of up to 96 numbers, in two orders: each addition may round.
        assert (grad - value).abs().max() <= 96 * torch.finfo(F64).eps * value.abs().max()


@pytest.mark.parametrize("view", VIEWS)
def test_takes_rows_of_any_strides(launch, view):
    x = VIEWS[view]()

    backward(launch, VIEWS[view](), x, random(64), random(*x.shape), None, 0.0, 1.0)


def test_a_gradient_of_one_number_for_all(launch):
    grad_y = random(1).expand(3, 4, 64)

    backward(launch, grad_y, random(3, 4, 64), random(3, 1, 64), None, random(64), 0.0, 0.0)


@pytest.mark.parametrize("shape", [(64,), (1, 64), (0, 64), (2, 0, 3, 64)])
def test_one_row_and_none(launch, shape):
    arguments = (random(*shape), random(*shape), random(64), random(64), random(64), 0.0, 1.0)

    grad_x, *others = backward(launch, *arguments)

    assert grad_x.shape == shape
    assert all(grad.any() == (0 not in shape) for grad in others)


@pytest.mark.parametrize("wanted", range(4))
@pytest.mark.parametrize("rows", [(2, 1), (2, 5)], ids=["a sequence", "a row"])
def test_computes_only_what_is_wanted(launch, rows, wanted):
    mask = tuple(index == wanted for index in range(4))
    modulators = random(*rows, 96), random(2, 1, 96)
    operands = (random(2, 5, 96), random(2, 5, 96), *modulators, random(96))

    grads = backward(launch, *operands, 0.0, 1.0, mask=mask)

    assert tuple(grad is not None for grad in grads) == mask


@pytest.mark.parametrize("modulator", ["full", "of a sequence", "of a position"])
def test_adds_up_in_memory_what_is_too_wide_for_registers(launch, modulator, streamed):
    rows, scale = (random(2, 3, 5, 64), random(2, 3, 5, 64)), MODULATORS[modulator]()

    backward(launch, *rows, scale, random(2, 1, 1, 64), random(64), 1.0, 1.0, tile=streamed)


def test_a_row_wider_than_the_registers(launch):
    rows = random(2, 8193), random(2, 8193)

    backward(launch, *rows, random(2, 8193), None, None, 0.0, 1.0)


def test_the_same_bits_twice(launch):
    modulators = random(2, 1, 96), random(2, 1, 96)
    operands = (random(2, 150, 96), random(2, 150, 96), *modulators, random(96))
    arguments = with_rstd(*operands, 1.0, 1.0)

    first, second = (
        launch("modulated_rms_norm_backward", *arguments, llama(BF16), EVERY) for _ in range(2)
    )

    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))
