"""The kernel of `gated_rms_norm`, interpreted."""

from dataclasses import replace
from itertools import product

import pytest
import torch

from normfuse.ops.gated_rms_norm import gated_rms_norm_fake, gated_rms_norm_reference
from normfuse.ops.gating import ACTIVATIONS, Gating
from normfuse.ops.rounding import RoundingPlan
from tests import float64
from tests.kernels.inputs import (
    BF16,
    F16,
    F32,
    F64,
    PAIRS,
    WIDTHS,
    assert_rounds_as_eager,
    changed,
    gemma,
    layouts,
    llama,
    random,
)

EPS = 1e-6

# The gates of Kimi Linear or Mamba 2, of a gate in bfloat16, and of one rounded on its way.
GATINGS = (
    Gating(F32, F32, F32, BF16),
    Gating(F32, F32, F32, F32),
    Gating(BF16, BF16, BF16, BF16),
    Gating(F32, BF16, BF16, BF16),
    Gating(F32, BF16, F32, F32),
    Gating(F32, F16, F32, F16),
)
BOTH_ORDERS = pytest.mark.parametrize("gate_first", [False, True], ids=["gate last", "gate first"])


def texts(arguments):
    """The arguments of the launcher as the op has them."""
    return tuple(str(a) if isinstance(a, (RoundingPlan, Gating)) else a for a in arguments)


def assert_errs_no_more_than_eager(results, arguments):
    eager = gated_rms_norm_reference(*texts(arguments))
    exact = float64.gated_rms_norm(*arguments[:-2])
    float64.assert_as_close_as_eager(results[0], eager[0], exact)
    assert layouts(results) == layouts(gated_rms_norm_fake(*texts(arguments)))


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("width", WIDTHS)
@BOTH_ORDERS
def test_errs_no_more_than_eager(launch, gate_first, width, dtype):
    x, gate, weight = random(4, width, dtype=dtype), random(4, width, dtype=dtype), random(width)
    types = Gating.once(F32 if gate_first else dtype)
    arguments = (x, gate, weight, EPS, 1.0, 1, gate_first, "silu", gemma(dtype), types)

    results = launch("gated_rms_norm", *arguments)

    assert_errs_no_more_than_eager(results, arguments)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@BOTH_ORDERS
def test_activations(launch, gate_first, activation):
    x, gate, weight = random(4, 96), 8 * random(4, 96), random(96)
    types = Gating.once(F32)
    arguments = (x, gate, weight, EPS, 0.0, 1, gate_first, activation, gemma(F32), types)

    results = launch("gated_rms_norm", *arguments)

    assert_errs_no_more_than_eager(results, arguments)


@pytest.mark.parametrize("activation", ["silu", "sigmoid"])
def test_gates_that_are_far_from_zero(launch, activation):
    gate = torch.tensor([[-1e4, -120.0, -88.0, -0.0, 0.0, 88.0, 120.0, 1e4]])
    arguments = (torch.ones(1, 8), gate, None, 0.0, 0.0, 1, False, activation)
    arguments += (RoundingPlan.once(F32, None), Gating.once(F32))

    results = launch("gated_rms_norm", *arguments)

    assert_errs_no_more_than_eager(results, arguments)


@pytest.mark.parametrize("spans", ["a row", "a group", "nothing"])
@pytest.mark.parametrize("groups", [2, 3])
@BOTH_ORDERS
def test_groups(launch, gate_first, groups, spans):
    x, gate = random(2, 5, 96), random(2, 5, 96)
    weight = {"a row": random(96), "a group": random(96 // groups), "nothing": None}[spans]
    plan = RoundingPlan.once(BF16, None) if weight is None else llama(BF16)
    types = Gating.once(F32 if gate_first else BF16)
    arguments = (x, gate, weight, EPS, 1.0, groups, gate_first, "silu", plan, types)

    results = launch("gated_rms_norm", *arguments)

    assert_errs_no_more_than_eager(results, arguments)
    assert results[1].shape == (2, 5, groups, 1)


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("groups", [1, 4])
@BOTH_ORDERS
def test_takes_rows_of_any_strides(launch, gate_first, groups, pair):
    x, gate = PAIRS[pair]()
    types = Gating.once(F32 if gate_first else BF16)
    arguments = (x, gate, random(64), EPS, 0.0, groups, gate_first, "silu", llama(BF16), types)

    results = launch("gated_rms_norm", *arguments)

    assert_errs_no_more_than_eager(results, arguments)
    assert layouts(results) == layouts(gated_rms_norm_reference(*texts(arguments)))


@pytest.mark.parametrize("gating", GATINGS, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@BOTH_ORDERS
def test_every_rounding_of_the_gate_is_eagers(launch, gate_first, activation, gating):
    x, gate, weight = random(64, 256), random(64, 256, dtype=F32), random(256)
    plan = llama(BF16) if gating.product == BF16 else gemma(F32)
    arguments = (x, gate, weight, EPS, 0.0, 1, gate_first, activation)
    plan = replace(plan, out=BF16) if gate_first else plan

    y, _ = launch("gated_rms_norm", *arguments, plan, gating)

    eager, _ = gated_rms_norm_reference(*arguments, str(plan), str(gating))
    if y.dtype != F32:
        assert_rounds_as_eager(y, eager)
    float64.assert_as_close_as_eager(y, eager, float64.gated_rms_norm(*arguments))
    others = [
        gated_rms_norm_reference(*arguments, str(plan), str(other))[0]
        for other in GATINGS
        if other != gating and other.out == gating.out
    ]
    assert all(changed(y, other) > 0 for other in others)


@BOTH_ORDERS
def test_reads_a_wide_row_in_chunks(launch, narrow_tile, gate_first):
    x, gate, weight = random(5, 128), random(5, 128), random(128)
    types = Gating.once(F32 if gate_first else BF16)
    arguments = (x, gate, weight, EPS, 1.0, 2, gate_first, "sigmoid", gemma(BF16), types)

    results = launch("gated_rms_norm", *arguments, tile=narrow_tile)

    assert_errs_no_more_than_eager(results, arguments)


def test_mixed_types(launch):
    for x, gate, weight in product((BF16, F32, F64), (F16, F32), (BF16, F32)):
        operands = random(3, 64, dtype=x), random(3, 64, dtype=gate), random(64, dtype=weight)
        wide = torch.promote_types(x, F32)
        plan = RoundingPlan.once(wide, weight)
        arguments = (*operands, EPS, 0.0, 1, False, "silu", plan, Gating(F32, F32, wide, x))

        results = launch("gated_rms_norm", *arguments)

        assert_errs_no_more_than_eager(results, arguments)


@pytest.mark.parametrize("shape", [(0, 64), (2, 0, 3, 64)])
@pytest.mark.parametrize("groups", [1, 2])
def test_no_rows(launch, groups, shape):
    x = torch.ones(shape, dtype=BF16)
    norm = (torch.ones(64), EPS, 0.0, groups, True, "silu", llama(BF16), Gating.once(F32))

    results = launch("gated_rms_norm", x, x, *norm)

    assert layouts(results) == layouts(gated_rms_norm_fake(x, x, *texts(norm)))


def test_leaves_out_what_nobody_reads(launch):
    norm = (random(64), EPS, 0.0, 1, False, "silu", llama(BF16), Gating.once(BF16))

    _, rstd = launch("gated_rms_norm", random(3, 64), random(3, 64), *norm, store_rstd=False)

    assert rstd is None
