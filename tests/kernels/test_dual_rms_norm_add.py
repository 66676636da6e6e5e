"""The kernel of `dual_rms_norm_add` and `dual_rms_norm_add_rms_norm`, interpreted."""

from dataclasses import replace
from importlib import import_module

import pytest
import torch

from normfuse.ops.residual_sum import Scales
from normfuse.ops.rounding import RoundingPlan
from tests import float64
from tests.kernels.inputs import (
    BF16,
    F16,
    F32,
    F64,
    PAIRS,
    SCALES,
    WIDTHS,
    assert_same_bits,
    changed,
    gemma,
    integers,
    layouts,
    llama,
    random,
)

STEM = "dual_rms_norm_add"
COUNTS = pytest.mark.parametrize("count", [3, 4])  # the fourth norm is that of the sum


def call(function, tensors, weights, scales, norms):
    """The reference or the fake of the op with as many norms."""
    stem = STEM if len(norms) == 3 else f"{STEM}_rms_norm"
    flat = [value for eps, offset, plan in norms for value in (eps, offset, str(plan))]
    op = getattr(import_module(f"normfuse.ops.{stem}"), f"{stem}_{function}")
    return op(*tensors, *weights, *scales, *flat)


def assert_errs_no_more_than_eager(results, tensors, weights, scales, norms):
    x_1, x_2, residual = tensors
    eager = call("reference", tensors, weights, scales, norms)
    (w_1, n_1), (w_2, n_2), (w_3, n_3), *rest = zip(weights, norms, strict=True)
    branch = float64.rms_norm(x_1, w_1, *n_1[:2]) + float64.rms_norm(x_2, w_2, *n_2[:2])
    total = float64.residual_sum(float64.rms_norm(branch, w_3, *n_3[:2]), residual, scales)
    exact = [float64.rms_norm(total, weight, *norm[:2]) for weight, norm in rest] + [total]
    for result, expected, truth in zip(results, eager, exact, strict=False):  # rstd has no rows
        float64.assert_as_close_as_eager(result, expected, truth)


def norms_of(count, dtype=BF16):
    """Each norm differs from the others."""
    plans = (gemma(dtype), llama(dtype), gemma(dtype), llama(dtype))
    return list(zip((1e-6, 1e-5, 1e-4, 1e-3), (1.0, 0.0, 0.5, 0.25), plans, strict=True))[:count]


def operands(*shape, count, dtype=BF16):
    tensors = tuple(random(*shape, dtype=dtype) for _ in range(3))
    return tensors, tuple(random(shape[-1], dtype=dtype) for _ in range(count))


@COUNTS
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("width", WIDTHS)
def test_errs_no_more_than_eager(launch, width, dtype, count):
    tensors, weights = operands(4, width, count=count, dtype=dtype)
    norms = norms_of(count, dtype)

    results = launch(STEM, *tensors, weights, Scales(), norms)

    assert_errs_no_more_than_eager(results, tensors, weights, Scales(), norms)


@COUNTS
@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_scales(launch, scales, dtype, count):
    tensors, weights = operands(4, 64, count=count, dtype=dtype)
    norms = norms_of(count, dtype)

    results = launch(STEM, *tensors, weights, SCALES[scales], norms)

    assert_errs_no_more_than_eager(results, tensors, weights, SCALES[scales], norms)


@pytest.mark.parametrize("plan", [llama(BF16), gemma(BF16)])
def test_the_first_two_norms_have_the_bits_of_their_plans(launch, plan):
    x, residual, weight = integers(4, 64), random(4, 64), random(64)
    norms = [(0.0, 0.0, plan), (0.0, 0.0, plan), (1e-6, 0.0, gemma(BF16))]

    results = launch(STEM, x, x.flip(-1), residual, [weight] * 3, Scales(), norms)

    eager = call("reference", (x, x.flip(-1), residual), [weight] * 3, Scales(), norms)
    assert_same_bits(results[1:3], eager[1:3])
    assert_errs_no_more_than_eager(
        results, (x, x.flip(-1), residual), [weight] * 3, Scales(), norms
    )


@pytest.mark.parametrize("plan", [llama(BF16), gemma(BF16)])
def test_the_last_norm_has_the_bits_of_its_plan(launch, plan):
    zeros, weight = torch.zeros(64).to(BF16), random(64)
    tensors, weights = (random(4, 64), random(4, 64), integers(4, 64)), [zeros] * 3 + [weight]
    norms = [(1e-6, 0.0, llama(BF16))] * 3 + [(0.0, 1.0, plan)]  # no branch: total is of integers

    results = launch(STEM, *tensors, weights, Scales(), norms)

    eager = call("reference", tensors, weights, Scales(), norms)
    assert_same_bits((*results[:2], results[5]), (*eager[:2], eager[5]))
    other = gemma(BF16) if plan == llama(BF16) else llama(BF16)
    norms[3] = (0.0, 1.0, other)
    assert changed(results[0], call("reference", tensors, weights, Scales(), norms)[0]) > 0


def test_rounds_the_sum_of_the_branches(launch):
    (x_1, x_2, residual), weights = operands(4, 64, count=3)
    norms = {
        out: [
            (1e-6, 0.0, llama(BF16)),
            (1e-6, 0.0, replace(llama(BF16), out=out)),
            (1e-6, 0.0, RoundingPlan.before_weight(out, BF16)),
        ]
        for out in (BF16, F32)
    }

    results = {
        out: launch(STEM, x_1, x_2, residual, weights, Scales(), norms[out]) for out in norms
    }

    for out, result in results.items():
        assert_errs_no_more_than_eager(result, (x_1, x_2, residual), weights, Scales(), norms[out])
    assert changed(results[BF16][0], results[F32][0].to(BF16)) > 0


@pytest.mark.parametrize(
    ("x_1", "x_2", "residual", "weight"),
    [(BF16, F32, BF16, F32), (F16, BF16, F32, BF16), (BF16, BF16, F64, F64), (F64, F16, BF16, F32)],
)
def test_mixed_types(launch, x_1, x_2, residual, weight):
    tensors = tuple(random(4, 64, dtype=dtype) for dtype in (x_1, x_2, residual))
    weights = [random(64, dtype=weight) for _ in range(4)]
    plans = [RoundingPlan.before_weight(x_1, weight), RoundingPlan.before_weight(x_2, weight)]
    branch = torch.promote_types(plans[0].out, plans[1].out)
    plans.append(RoundingPlan.before_weight(branch, weight))
    total = torch.promote_types(plans[2].out, residual)
    plans.append(RoundingPlan.before_weight(total, weight))
    norms = [(1e-6, 0.0, plan) for plan in plans]

    results = launch(STEM, *tensors, weights, Scales(branch=0.22), norms)

    assert_errs_no_more_than_eager(results, tensors, weights, Scales(branch=0.22), norms)


def test_weightless_norms(launch):
    tensors, _ = operands(4, 64, count=0)
    norms = [(1e-6, 0.0, RoundingPlan.once(BF16, None))] * 4

    results = launch(STEM, *tensors, [None] * 4, Scales(), norms)

    assert_errs_no_more_than_eager(results, tensors, [None] * 4, Scales(), norms)


@COUNTS
@pytest.mark.parametrize("pair", PAIRS)
def test_takes_rows_of_any_strides(launch, pair, count):
    (x_1, residual), x_2 = PAIRS[pair](), random(2, 5, 3, 64).transpose(1, 2)
    weights, norms = [random(64) for _ in range(count)], norms_of(count)

    for tensors in ((x_1, residual, x_2), (x_2, x_1, residual), (x_1, x_1, residual)):
        results = launch(STEM, *tensors, weights, Scales(), norms)

        assert_errs_no_more_than_eager(results, tensors, weights, Scales(), norms)
        assert layouts(results) == layouts(call("fake", tensors, weights, Scales(), norms))
        eager = call("reference", tensors, weights, Scales(), norms)
        assert layouts(results) == layouts(eager)


@COUNTS
@pytest.mark.parametrize("shape", [(0, 64), (2, 0, 3, 64)])
def test_no_rows(launch, shape, count):
    tensors, weights = operands(*shape, count=count)

    results = launch(STEM, *tensors, weights, Scales(), norms_of(count))

    fakes = call("fake", tensors, weights, Scales(), norms_of(count))
    assert layouts(results) == layouts(fakes)


@COUNTS
def test_leaves_out_what_nobody_reads(launch, count):
    tensors, weights = operands(3, 64, count=count)
    arguments = (STEM, *tensors, weights, Scales(), norms_of(count))
    whole = launch(*arguments)

    for asked_for in range(len(whole)):
        stored = [index == asked_for for index in range(len(whole))]
        results = launch(*arguments, stored=stored)

        assert [result is not None for result in results] == [True, *stored[1:]]
        assert_same_bits(results, whole)


@COUNTS
@pytest.mark.parametrize("is_stored", [True, False])
def test_reads_a_wide_row_in_chunks(launch, narrow_tile, is_stored, count):
    tensors, weights = operands(5, 64, count=count)
    arguments = (STEM, *tensors, weights, SCALES["numbers"], norms_of(count))
    stored = [True, is_stored, *[True] * (2 * count - 4)]

    results = launch(*arguments, tile=narrow_tile, stored=stored)

    whole = launch(*arguments)
    results = [other if mine is None else mine for mine, other in zip(results, whole, strict=True)]
    scales = SCALES["numbers"]
    assert_errs_no_more_than_eager(results, tensors, weights, scales, norms_of(count))
