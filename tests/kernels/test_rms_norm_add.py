"""The kernel of `rms_norm_add`, interpreted."""

import pytest
import torch

from normfuse.ops.residual_sum import Scales
from normfuse.ops.rms_norm_add import rms_norm_add_fake, rms_norm_add_reference
from normfuse.ops.rounding import ROOTS, RoundingPlan
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

EPS = 1e-6


def assert_follows_eager(results, x, residual, weight, scales, offset, plan):
    eager, _ = rms_norm_add_reference(x, residual, weight, *scales, EPS, offset, str(plan))
    exact = float64.residual_sum(float64.rms_norm(x, weight, EPS, offset), residual, scales)
    float64.assert_as_close_as_eager(results[0], eager, exact)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("width", WIDTHS)
def test_errs_no_more_than_eager(launch, width, dtype):
    x, residual, weight = (random(*shape, dtype=dtype) for shape in [(4, width)] * 2 + [(width,)])
    plan = llama(dtype)

    results = launch("rms_norm_add", x, residual, weight, Scales(), EPS, 1.0, plan)

    assert_follows_eager(results, x, residual, weight, Scales(), 1.0, plan)


@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize("plan", [llama(BF16), gemma(BF16), RoundingPlan.once(F32, F32)])
def test_every_sum_has_eagers_bits(launch, plan, scales):
    dtype = plan.out
    x, residual = integers(4, 64, dtype=dtype), random(4, 64, dtype=dtype)
    weight, factors = random(64, dtype=dtype), SCALES[scales]

    results = launch("rms_norm_add", x, residual, weight, factors, 0.0, 1.0, plan)

    eager = rms_norm_add_reference(x, residual, weight, *factors, 0.0, 1.0, str(plan))
    assert_same_bits(results, eager)


@pytest.mark.parametrize("root", ROOTS)
def test_a_weightless_norm(launch, root):
    x, residual = integers(4, 64, dtype=F32), random(4, 64, dtype=F32)
    plan = RoundingPlan(F32, F32, (F32,), None, F32, root=root)

    results = launch("rms_norm_add", x, residual, None, Scales(), 0.0, 0.0, plan)

    eager = rms_norm_add_reference(x, residual, None, *Scales(), 0.0, 0.0, str(plan))
    assert_same_bits(results, eager)


@pytest.mark.parametrize(
    ("x", "residual", "weight"),
    [(BF16, F32, BF16), (F32, BF16, F32), (F16, BF16, F32), (BF16, F64, F64), (F64, F16, BF16)],
)
def test_mixed_types(launch, x, residual, weight):
    x, residual = integers(4, 64, dtype=x), random(4, 64, dtype=residual)
    weight, scales = random(64, dtype=weight), Scales(branch=0.22)
    plan = RoundingPlan.before_weight(x.dtype, weight.dtype)

    results = launch("rms_norm_add", x, residual, weight, scales, 0.0, 0.0, plan)

    eager = rms_norm_add_reference(x, residual, weight, *scales, 0.0, 0.0, str(plan))
    assert_same_bits(results, eager)


@pytest.mark.parametrize("pair", PAIRS)
def test_takes_rows_of_any_strides(launch, pair):
    (x, residual), weight, plan = PAIRS[pair](), random(64), llama(BF16)

    results = launch("rms_norm_add", x, residual, weight, Scales(), EPS, 1.0, plan)

    assert_follows_eager(results, x, residual, weight, Scales(), 1.0, plan)
    fakes = rms_norm_add_fake(x, residual, weight, *Scales(), EPS, 1.0, str(plan))
    assert layouts(results) == layouts(fakes)


def test_follows_the_plan_and_not_only_the_formula(launch):
    x, residual, weight = integers(4, 64), random(4, 64), random(64)
    arguments = (x, residual, weight, *Scales(), 0.0, 1.0)

    results = {
        plan: launch("rms_norm_add", x, residual, weight, Scales(), 0.0, 1.0, plan)
        for plan in (llama(BF16), gemma(BF16))
    }

    for plan, result in results.items():
        assert_same_bits(result, rms_norm_add_reference(*arguments, str(plan)))
    assert changed(results[llama(BF16)][0], results[gemma(BF16)][0]) > 0


@pytest.mark.parametrize("shape", [(0, 64), (2, 0, 3, 64)])
def test_no_rows(launch, shape):
    x, plan = torch.ones(shape, dtype=BF16), llama(BF16)

    results = launch("rms_norm_add", x, x.float(), torch.ones(64), Scales(), EPS, 0.0, plan)

    fakes = rms_norm_add_fake(x, x.float(), torch.ones(64), *Scales(), EPS, 0.0, str(plan))
    assert layouts(results) == layouts(fakes)


def test_leaves_out_what_nobody_reads(launch):
    x, residual, weight = random(3, 64), random(3, 64), random(64)
    arguments = ("rms_norm_add", x, residual, weight, Scales(), EPS, 0.0, llama(BF16))

    total, rstd = launch(*arguments, store_rstd=False)

    assert rstd is None
    assert_same_bits((total, rstd), launch(*arguments))


def test_reads_a_wide_row_in_chunks(launch, narrow_tile):
    (x, residual), weight = PAIRS["x sliced"](), random(64)
    x = integers(1, 64).expand(2, 3, 5, 64)
    arguments = (x, residual, weight, SCALES["numbers"], 0.0, 1.0, gemma(BF16))

    results = launch("rms_norm_add", *arguments, tile=narrow_tile)

    assert_same_bits(results, launch("rms_norm_add", *arguments))
