"""The kernel of `rms_norm_add_rms_norm_backward`, interpreted."""

import pytest
import torch

from normfuse.ops.rms_norm_add_rms_norm_backward import (
    gathered,
    rms_norm_add_rms_norm_backward_fake,
    rms_norm_add_rms_norm_backward_reference,
)
from tests.kernels.backward import assert_errs_no_more_than, rstd_of
from tests.kernels.inputs import BF16, F32, PAIRS, SCALES, WIDTHS, gemma, layouts, random

STEM = "rms_norm_add_rms_norm_backward"
PLAN = str(gemma(BF16))
ALL = (True, True, True, True)


def backward(launch, x, total, *, grad_total, scales=SCALES["none"], mask=ALL, **settings):
    """The interpreted kernel's gradients, compared with those of the reference."""
    weights = [random(x.shape[-1]) for _ in range(2)]
    tensors = (random(*x.shape), grad_total, x, total, *weights, rstd_of(x), rstd_of(total))
    arguments = (*tensors, *scales, 1.0, PLAN, 0.5, PLAN, BF16, mask)
    grads = launch(STEM, *gathered(arguments), **settings)
    assert_errs_no_more_than(rms_norm_add_rms_norm_backward_reference, grads, *arguments)
    fakes = rms_norm_add_rms_norm_backward_fake(*arguments)
    assert layouts([g for g in grads if g is not None]) == layouts(
        [g for g in fakes if g is not None]
    )
    return grads


@pytest.mark.parametrize("width", WIDTHS)
def test_errs_no_more_than_the_reference(launch, width):
    backward(launch, *(random(5, width) for _ in range(2)), grad_total=random(5, width))


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_more_rows_than_programs(launch, dtype, few_programs):
    x, total, grad_total = (random(23, 96, dtype=dtype) for _ in range(3))

    backward(launch, x, total, grad_total=grad_total, tile=few_programs(96, norms=2))


@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize("is_streamed", [True, False])
def test_scales(launch, scales, is_streamed, streamed):
    tile = {"tile": streamed} if is_streamed else {}
    x, total, grad_total = (random(7, 100) for _ in range(3))

    backward(launch, x, total, grad_total=grad_total, scales=SCALES[scales], **tile)


@pytest.mark.parametrize("is_streamed", [True, False])
def test_a_total_that_nothing_else_reads(launch, is_streamed, streamed):
    tile = {"tile": streamed} if is_streamed else {}

    backward(launch, random(4, 100), random(4, 100), grad_total=None, **tile)


@pytest.mark.parametrize("pair", PAIRS)
def test_takes_rows_of_any_strides(launch, pair):
    x, total = PAIRS[pair]()

    backward(launch, x, total, grad_total=random(*x.shape))


@pytest.mark.parametrize(
    "mask",
    [
        (True, True, False, False),
        (False, False, True, True),
        (False, True, False, True),
        (True, False, False, False),
    ],
)
@pytest.mark.parametrize("is_streamed", [True, False])
def test_computes_only_what_is_wanted(launch, mask, is_streamed, streamed):
    tile = {"tile": streamed} if is_streamed else {}

    grads = backward(
        launch, random(4, 100), random(4, 100), grad_total=random(4, 100), mask=mask, **tile
    )

    assert tuple(grad is not None for grad in grads) == mask


def test_a_row_wider_than_the_registers(launch):
    backward(launch, random(2, 8193), random(2, 8193), grad_total=None)


def test_no_rows(launch):
    empty = torch.ones(0, 64, dtype=BF16)

    grads = backward(launch, empty, empty, grad_total=empty)

    assert not any(grad.any() for grad in grads)
