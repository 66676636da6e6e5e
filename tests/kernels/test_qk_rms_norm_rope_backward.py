"""The kernel of `qk_rms_norm_rope_backward`, interpreted."""

import pytest
import torch

from normfuse.ops.qk_rms_norm_rope_backward import (
    HELD_WIDTH,
    for_launch,
    qk_rms_norm_rope_backward_fake,
    qk_rms_norm_rope_backward_reference,
)
from normfuse.ops.rounding import RoundingPlan
from tests.float64 import assert_as_close_as_eager
from tests.kernels.backward import rstd_of
from tests.kernels.inputs import BF16, F16, F32, VIEWS, gemma, layouts, random
from tests.kernels.test_qk_rms_norm_rope import ROTATIONS, queries_and_keys, rotation, tables

STEM, EPS = "qk_rms_norm_rope_backward", 1e-6
WEIGHTED, WEIGHTLESS = str(gemma(BF16)), str(RoundingPlan.once(BF16, None))


@pytest.fixture(params=["rstd kept", "rstd computed anew"])
def kept(request):
    """What of the rstd of the forward there is."""
    return (lambda xs: [rstd_of(x) for x in xs]) if request.param == "rstd kept" else lambda xs: []


def backward(
    launch,
    xs,
    plans,
    turns,
    cos_sin=(None, None),
    *,
    mask=None,
    weights=None,
    kept=None,
    **settings,
):
    """The interpreted kernel's gradients, compared with those of the reference."""
    grads = [random(*x.shape, dtype=x.dtype) for x in xs]
    weighted = [x for x, plan in zip(xs, plans, strict=True) if plan == WEIGHTED]
    weights = weights or [random(x.shape[-1], dtype=x.dtype) for x in weighted]
    mask = mask or [True] * (len(xs) + len(weights))
    numbers = ([EPS] * len(xs), [1.0] * len(xs), plans, turns, mask)
    rstds = [rstd_of(x) for x in xs] if kept is None else kept(xs)
    arguments = (xs, grads, weights, rstds, *cos_sin, *numbers)

    results = launch(STEM, *for_launch(arguments), **settings)

    assert layouts(results) == layouts(qk_rms_norm_rope_backward_fake(*arguments))
    plain = qk_rms_norm_rope_backward_reference(*arguments)
    exact = qk_rms_norm_rope_backward_reference(*map(wide, arguments[:6]), *numbers)
    for result, expected, value in zip(results, plain, exact, strict=True):
        assert_as_close_as_eager(result, expected, value)
    return results


def wide(argument):
    if isinstance(argument, list):
        return [tensor.double() for tensor in argument]
    return None if argument is None else argument.double()


@pytest.mark.parametrize("name", ROTATIONS)
def test_every_rotation(launch, name, kept):
    xs, turns = queries_and_keys(random, BF16), [rotation(name, BF16)] * 2

    backward(launch, xs, [WEIGHTED] * 2, turns, tables(name, BF16), kept=kept)


@pytest.mark.parametrize("dtype", [F16, F32])
def test_types(launch, dtype, kept):
    xs, turns = queries_and_keys(random, dtype), [rotation("half", dtype)] * 2

    backward(launch, xs, [WEIGHTED] * 2, turns, tables("half", dtype), kept=kept)


def test_a_value_beside_them_does_not_turn(launch, kept):
    xs = [*queries_and_keys(random, BF16), random(2, 5, 3, 40)]
    turns = [rotation("half", BF16)] * 2 + ["none"]

    backward(launch, xs, [WEIGHTED] * 2 + [WEIGHTLESS], turns, tables("half", BF16), kept=kept)


def test_rows_that_are_not_there_add_nothing_without_eps(launch):
    """Their rstd is infinite: a tile of many rows has some that are beyond the last."""
    x, grad, weight = (random(*shape) for shape in ((3, 64), (3, 64), (64,)))
    numbers = ([0.0], [0.0], [WEIGHTED], ["none"], [True, True])

    grads = launch(STEM, *for_launch(([x], [grad], [weight], [], None, None, *numbers)))

    assert all(grad.isfinite().all() for grad in grads)


def test_more_rows_than_programs(launch):
    xs = [random(2, 4, 40, 64), random(2, 2, 40, 64)]
    cos_sin = [random(1, 1, 40, 64) for _ in range(2)]

    backward(launch, xs, [WEIGHTED] * 2, [rotation("half", BF16)] * 2, cos_sin, programs=3)


@pytest.mark.parametrize("view", [name for name in VIEWS if name != "four strides"])
def test_takes_rows_of_any_strides(launch, view, kept):
    """Strides of four levels are declined before a launch."""
    xs = [VIEWS[view](), random(3, 24)]

    backward(launch, xs, [WEIGHTED, WEIGHTLESS], ["none"] * 2, kept=kept)


@pytest.mark.parametrize("widths", [(1, 3), (769, 16), (2048, 512)])
def test_widths_may_differ(launch, widths, kept):
    xs = [random(5, width) for width in widths]

    backward(launch, xs, [WEIGHTED] * 2, ["none"] * 2, kept=kept)


def test_forward_and_backward_agree_on_which_rows_are_held():
    """Kernel files import nothing of ours, so that the number stands twice."""
    kernel = pytest.importorskip("normfuse.ops.kernels.qk_rms_norm_rope_backward")
    assert kernel.MAX_WIDTH == HELD_WIDTH


def test_an_empty_tensor_beside_a_full_one(launch):
    backward(launch, [random(0, 64), random(3, 64)], [WEIGHTED] * 2, ["none"] * 2)


@pytest.mark.parametrize("mask", [[True, True, False, False], [False, False, True, True]])
def test_computes_only_what_is_wanted(launch, mask):
    xs, turns = queries_and_keys(random, BF16), [rotation("half", BF16)] * 2

    results = backward(launch, xs, [WEIGHTED] * 2, turns, tables("half", BF16), mask=mask)

    assert len(results) == 2


def test_the_same_bits_twice(launch):
    xs, cos_sin = queries_and_keys(random, BF16), tables("half", BF16)
    rstds, weights = [rstd_of(x) for x in xs], [random(64) for _ in xs]
    numbers = ([EPS] * 2, [0.0] * 2, [WEIGHTED] * 2, [rotation("half", BF16)] * 2, [True] * 4)
    arguments = for_launch((xs, xs, weights, rstds, *cos_sin, *numbers))

    first, second = (launch(STEM, *arguments) for _ in range(2))

    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))
