"""The kernel of `gated_rms_norm_backward`, interpreted."""

import pytest
import torch

from normfuse.ops.gated_rms_norm_backward import (
    gated_rms_norm_backward_fake,
    gated_rms_norm_backward_reference,
)
from normfuse.ops.gating import ACTIVATIONS, Gating, gated
from normfuse.ops.groups import split
from normfuse.ops.rounding import RoundingPlan
from tests.kernels.backward import assert_errs_no_more_than, rstd_of
from tests.kernels.inputs import BF16, F16, F32, F64, PAIRS, WIDTHS, layouts, llama, random

PLAN = str(llama(BF16))
EVERY = (True, True, True)
BOTH_ORDERS = pytest.mark.parametrize("gate_first", [False, True], ids=["gate last", "gate first"])


def with_rstd(grad_y, x, gate, weight, offset, groups, gate_first, activation="silu"):
    """The op's arguments up to the plan."""
    wide = torch.promote_types(x.dtype, F32)
    value = gated(x, gate, activation, Gating.once(wide)) if gate_first else x
    rstd = rstd_of(split(value, groups)).contiguous()
    return grad_y, x, gate, weight, rstd, offset, groups, gate_first, activation


def backward(launch, *arguments, mask=EVERY, plan=PLAN, **settings):
    """The interpreted kernel's gradients, compared with those of the reference."""
    arguments = with_rstd(*arguments)
    grads = launch(
        "gated_rms_norm_backward", *arguments, RoundingPlan.parse(plan), mask, **settings
    )
    assert_errs_no_more_than(gated_rms_norm_backward_reference, grads, *arguments, plan, mask)
    fakes = gated_rms_norm_backward_fake(*arguments, plan, mask)
    present = [(grad, fake) for grad, fake in zip(grads, fakes, strict=True) if grad is not None]
    assert all(layouts((grad,)) == layouts((fake,)) for grad, fake in present)
    return grads


@BOTH_ORDERS
@pytest.mark.parametrize("width", WIDTHS)
def test_errs_no_more_than_the_reference(launch, width, gate_first):
    rows = [random(5, width) for _ in range(3)]

    backward(launch, *rows, random(width), 1.0, 1, gate_first)


@BOTH_ORDERS
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(launch, activation, gate_first):
    grad_y, x, gate = random(4, 96), random(4, 96), 8 * random(4, 96)

    backward(launch, grad_y, x, gate, random(96), 0.0, 1, gate_first, activation)


@pytest.mark.parametrize("activation", ["silu", "sigmoid"])
def test_gates_that_are_far_from_zero(launch, activation):
    gate = torch.tensor([[-1e4, -120.0, -88.0, -0.0, 0.0, 88.0, 120.0, 1e4]])
    rows = (random(1, 8, dtype=F32), random(1, 8, dtype=F32), gate)

    backward(launch, *rows, None, 0.0, 1, False, activation)


@BOTH_ORDERS
@pytest.mark.parametrize("groups", [2, 3])
@pytest.mark.parametrize("spans", ["a row", "a group", "nothing"])
def test_groups(launch, spans, groups, gate_first, few_programs):
    rows = [random(2, 11, 96) for _ in range(3)]
    weight = {"a row": random(96), "a group": random(96 // groups), "nothing": None}[spans]

    backward(launch, *rows, weight, 1.0, groups, gate_first, tile=few_programs(96 // groups))


@pytest.mark.parametrize(
    ("grad", "x", "gate", "weight"),
    [(F32, F32, F32, F32), (F16, F16, F16, F16), (BF16, F32, BF16, BF16), (F32, BF16, F32, F64)],
)
@BOTH_ORDERS
def test_mixed_types(launch, gate_first, grad, x, gate, weight):
    rows = [random(65, 96, dtype=dtype) for dtype in (grad, x, gate)]
    plan = str(RoundingPlan.once(x, weight))

    backward(launch, *rows, random(96, dtype=weight), 0.0, 2, gate_first, plan=plan)


@BOTH_ORDERS
def test_float64_accumulates_in_float64(launch, gate_first):
    rows, plan = [random(7, 96, dtype=F64) for _ in range(3)], RoundingPlan.once(F64, F64)
    arguments = with_rstd(*rows, random(96, dtype=F64), 0.1, 2, gate_first)

    grads = launch("gated_rms_norm_backward", *arguments, plan, EVERY)

    expected = gated_rms_norm_backward_reference(*arguments, str(plan), EVERY)
    for grad, value in zip(grads, expected, strict=True):
        # Sums of up to 96 numbers, in two orders: each addition may round.
        assert (grad - value).abs().max() <= 96 * torch.finfo(F64).eps * value.abs().max()


@pytest.mark.parametrize(("groups", "gate_first"), [(1, True), (4, False)])
@pytest.mark.parametrize("pair", PAIRS)
def test_takes_rows_of_any_strides(launch, pair, groups, gate_first):
    x, gate = PAIRS[pair]()

    backward(launch, PAIRS[pair]()[0], x, gate, random(64), 0.0, groups, gate_first)


def test_a_gradient_of_one_number_for_all(launch):
    grad_y = random(1).expand(3, 4, 64)

    backward(launch, grad_y, random(3, 4, 64), random(3, 4, 64), random(64), 0.0, 2, False)


@pytest.mark.parametrize("shape", [(64,), (0, 64), (2, 0, 3, 64)])
@pytest.mark.parametrize("groups", [1, 2])
def test_one_row_and_none(launch, groups, shape):
    rows = [random(*shape) for _ in range(3)]

    *grads, grad_weight = backward(launch, *rows, random(64), 0.0, groups, False)

    assert [grad.shape for grad in grads] == [shape] * 2
    assert grad_weight.any() == (0 not in shape)


@BOTH_ORDERS
@pytest.mark.parametrize("wanted", range(3))
def test_computes_only_what_is_wanted(launch, wanted, gate_first):
    mask = tuple(index == wanted for index in range(3))
    rows = [random(6, 96) for _ in range(3)]

    grads = backward(launch, *rows, random(96), 0.0, 2, gate_first, mask=mask)

    assert tuple(grad is not None for grad in grads) == mask


@BOTH_ORDERS
@pytest.mark.parametrize("groups", [1, 2])
def test_adds_up_in_memory_what_is_too_wide_for_registers(launch, groups, gate_first, streamed):
    rows = [random(7, 100 * groups) for _ in range(3)]

    backward(launch, *rows, random(100 * groups), 1.0, groups, gate_first, tile=streamed)


def test_a_row_wider_than_the_registers(launch):
    rows = [random(2, 12289) for _ in range(3)]

    backward(launch, *rows, random(12289), 1.0, 1, False, mask=(True, True, False))


def test_a_weight_of_any_stride(launch):
    rows = [random(5, 64) for _ in range(3)]

    backward(launch, *rows, random(64, 2)[:, 0], 0.0, 2, False)


@BOTH_ORDERS
def test_the_same_bits_twice(launch, gate_first):
    rows = [random(300, 96) for _ in range(3)]
    arguments = with_rstd(*rows, random(96), 1.0, 2, gate_first)

    first, second = (
        launch("gated_rms_norm_backward", *arguments, llama(BF16), EVERY) for _ in range(2)
    )

    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))
