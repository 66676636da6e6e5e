"""The kernel of `rms_norms`, interpreted."""

from dataclasses import replace

import pytest
import torch

from normfuse.ops.rms_norms import rms_norms_fake, rms_norms_reference
from normfuse.ops.rounding import ROOTS, RoundingPlan
from tests import float64
from tests.kernels.inputs import (
    BF16,
    F16,
    F32,
    F64,
    PLANS,
    VIEWS,
    WIDTHS,
    assert_same_bits,
    changed,
    gemma,
    integers,
    layouts,
    llama,
    random,
)

STEM = "rms_norms"
OFFSETS, SCALES = [1.0, 0.0, 0.0], [1.0, 0.3, 1.0]


def weightless(dtype):
    """The router's norm."""
    return RoundingPlan.once(dtype, None)


def reference(x, weights, eps, offsets, scales, plans):
    present = [weight for weight in weights if weight is not None]
    return rms_norms_reference(x, present, eps, offsets, scales, [str(plan) for plan in plans])


def assert_errs_no_more_than_eager(results, x, weights, plans, offsets=OFFSETS, scales=SCALES):
    eager = reference(x, weights, 1e-6, offsets, scales, plans)
    for y, expected, weight, offset, scale in zip(
        results[:-1], eager[:-1], weights, offsets, scales, strict=True
    ):
        exact = float64.rms_norm(x, weight, 1e-6, offset) * scale
        float64.assert_as_close_as_eager(y, expected, exact)


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("width", WIDTHS)
def test_errs_no_more_than_eager(launch, width, dtype):
    x, weights = random(5, width, dtype=dtype), [random(width, dtype=dtype), None, random(width)]
    plans = [gemma(dtype), weightless(dtype), RoundingPlan.before_weight(dtype, BF16)]

    results = launch(STEM, x, weights, 1e-6, OFFSETS, SCALES, plans)

    assert_errs_no_more_than_eager(results, x, weights, plans)


@pytest.mark.parametrize("count", [2, 3, 4])
def test_every_norm_has_a_slot(launch, count):
    x, weights = integers(4, 64), [random(64) for _ in range(count)]
    offsets, scales = [0.0, 1.0, 0.5, 0.25][:count], [0.3, 1.0, 0.125, 0.7][:count]
    norms = (weights, 0.0, offsets, scales, [llama(BF16), gemma(BF16), *[llama(BF16)] * 2][:count])

    results = launch(STEM, x, *norms)

    assert len(results) == count + 1
    assert_same_bits(results, reference(x, *norms))


@pytest.mark.parametrize("view", VIEWS)
def test_takes_rows_of_any_strides(launch, view):
    x, weights, plans = VIEWS[view](), [random(64), None], [llama(BF16), weightless(BF16)]

    results = launch(STEM, x, weights, 1e-6, [0.0, 0.0], [1.0, 0.3], plans)

    assert_errs_no_more_than_eager(results, x, weights, plans, [0.0, 0.0], [1.0, 0.3])
    names = [str(plan) for plan in plans]
    assert layouts(results) == layouts(rms_norms_fake(x, weights[:1], 1e-6, [], [], names))


@pytest.mark.parametrize("plan", PLANS)
def test_every_rounding_of_the_plan_has_eagers_bits(launch, plan):
    steps = RoundingPlan.parse(plan)
    x = integers(4, 64, dtype=steps.unit[-1])
    weight = None if steps.weight is None else random(64, dtype=steps.weight[1])
    first = replace(weightless(BF16), compute=steps.compute, rstd=steps.compute)
    plans = [replace(first, mean=steps.mean, root=steps.root), steps]
    norms = ([None, weight], 0.0, [0.0, 1.0], [1.0, 0.3], plans)

    results = launch(STEM, x, *norms)

    assert_same_bits(results, reference(x, *norms))


@pytest.mark.parametrize("root", ROOTS)
def test_every_root_has_eagers_bits(launch, root):
    x, plans = integers(4, 64), [replace(llama(BF16), root=root), replace(gemma(BF16), root=root)]
    norms = ([random(64), random(64)], 0.0, [0.0, 1.0], [1.0, 1.0], plans)

    results = launch(STEM, x, *norms)

    assert_same_bits(results, reference(x, *norms))


def test_a_scale_is_a_rounding_of_its_own(launch):
    x, weights = integers(4, 64), [random(64), random(64) * 0.3]
    norms = (0.0, [0.0, 0.0], [0.3, 1.0], [llama(BF16)] * 2)

    results = launch(STEM, x, weights, *norms)

    assert_same_bits(results, reference(x, weights, *norms))
    once = (float64.rms_norm(x, weights[0], 0.0, 0.0) * 0.3).to(BF16)
    assert changed(results[0], once) > 0


def test_numbers_are_exact_in_float64(launch):
    x, weights = integers(4, 64, dtype=F64), [random(64, dtype=F64)] * 2
    norms = (0.1, [0.1, 0.0], [0.3, 1.0], [RoundingPlan.once(F64, F64)] * 2)

    results = launch(STEM, x, weights, *norms)

    assert_same_bits(results, reference(x, weights, *norms))


@pytest.mark.parametrize("shape", [(0, 64), (2, 0, 3, 64)])
def test_no_rows(launch, shape):
    x, plans = torch.ones(shape, dtype=BF16), [weightless(BF16)] * 2

    results = launch(STEM, x, [None, None], 1e-6, [0.0, 0.0], [1.0, 1.0], plans)

    names = [str(plan) for plan in plans]
    assert layouts(results) == layouts(rms_norms_fake(x, [], 1e-6, [], [], names))


@pytest.mark.parametrize("stored", [(0,), (1,), (0, 1, 2), (2,)])
def test_leaves_out_what_nobody_reads(launch, stored):
    x, weights = random(4, 64), [random(64), random(64)]
    arguments = (STEM, x, weights, 1e-6, [0.0, 0.0], [1.0, 1.0], [llama(BF16)] * 2)

    results = launch(*arguments, stored=[index in stored for index in range(3)])

    asked_for = {*stored, 0} if stored == (2,) else {*stored}  # rstd alone brings one y along
    assert {index for index in range(3) if results[index] is not None} == asked_for
    assert_same_bits(results, launch(*arguments))


def test_reads_a_wide_row_in_chunks(launch, narrow_tile):
    x, weights = integers(5, 64), [random(64), None, random(64)]
    norms = (weights, 0.0, OFFSETS, SCALES, [gemma(BF16), weightless(BF16), llama(BF16)])

    results = launch(STEM, x, *norms, tile=narrow_tile)

    assert_same_bits(results, reference(x, *norms))
