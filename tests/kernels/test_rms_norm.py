"""The kernel of `rms_norm`, interpreted."""

from dataclasses import replace
from itertools import product

import pytest
import torch

from normfuse.ops.rms_norm import rms_norm_fake, rms_norm_reference
from normfuse.ops.rounding import MEANS, ROOTS, RoundingPlan
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

EPS = 1e-6


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("width", WIDTHS)
def test_errs_no_more_than_eager(launch, width, dtype):
    x, weight, plan = random(5, width, dtype=dtype), random(width, dtype=dtype), llama(dtype)

    y, rstd = launch("rms_norm", x, weight, None, EPS, 1.0, plan)

    eager_y, eager_rstd = rms_norm_reference(x, weight, None, EPS, 1.0, str(plan))
    float64.assert_as_close_as_eager(y, eager_y, float64.rms_norm(x, weight, EPS, 1.0))
    exact_rstd = (x.double().square().mean(-1, keepdim=True) + EPS).rsqrt()
    float64.assert_as_close_as_eager(rstd, eager_rstd, exact_rstd)


@pytest.mark.parametrize("view", VIEWS)
def test_takes_rows_of_any_strides(launch, view):
    x, weight, plan = VIEWS[view](), random(64), llama(BF16)

    y, rstd = launch("rms_norm", x, weight, None, EPS, 0.0, plan)

    eager_y, _ = rms_norm_reference(x, weight, None, EPS, 0.0, str(plan))
    float64.assert_as_close_as_eager(y, eager_y, float64.rms_norm(x, weight, EPS, 0.0))
    assert layouts((y, rstd)) == layouts(rms_norm_fake(x, weight, None, EPS, 0.0, str(plan)))


@pytest.mark.parametrize("shape", [(0, 64), (2, 0, 3, 64)])
def test_no_rows(launch, shape):
    y, rstd = launch("rms_norm", torch.ones(shape), None, None, EPS, 0.0, gemma(F32))

    assert layouts((y, rstd)) == layouts(
        (torch.ones(shape), torch.ones(shape).mean(-1, keepdim=True))
    )


def test_reads_a_wide_row_in_chunks(launch, narrow_tile):
    x, weight, plan = (
        torch.cat([integers(5, 64), random(5, 64)], 1)[:, :64],
        random(64),
        gemma(BF16),
    )

    results = launch("rms_norm", x, weight, None, 0.0, 1.0, plan, tile=narrow_tile)

    assert_same_bits(results, rms_norm_reference(x, weight, None, 0.0, 1.0, str(plan)))


def test_a_row_wider_than_any_tile(launch):
    x, weight, plan = random(2, 65537), random(65537), llama(BF16)

    y, _ = launch("rms_norm", x, weight, None, EPS, 1.0, plan)

    eager_y, _ = rms_norm_reference(x, weight, None, EPS, 1.0, str(plan))
    float64.assert_as_close_as_eager(y, eager_y, float64.rms_norm(x, weight, EPS, 1.0))


@pytest.mark.parametrize("compute", [F32, F64, BF16, F16])
@pytest.mark.parametrize(("mean", "root"), [*product(MEANS, ROOTS)])
def test_every_mean_and_root_has_eagers_bits(launch, mean, root, compute):
    x, weight = integers(4, 64), random(64)
    plan = replace(llama(BF16), compute=compute, rstd=compute, mean=mean, root=root)

    results = launch("rms_norm", x, weight, None, 0.0, 0.0, plan)

    assert_same_bits(results, rms_norm_reference(x, weight, None, 0.0, 0.0, str(plan)))


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_every_rounding_of_the_plan_has_eagers_bits(launch, plan, offset):
    steps = RoundingPlan.parse(plan)
    x = integers(4, 64, dtype=steps.unit[-1])
    weight = None if steps.weight is None else random(64, dtype=steps.weight[1])

    results = launch("rms_norm", x, weight, None, 0.0, offset, steps)

    assert_same_bits(results, rms_norm_reference(x, weight, None, 0.0, offset, plan))


@pytest.mark.parametrize("mean", MEANS)
def test_a_narrow_sum_is_rounded_before_it_is_divided(launch, mean):
    x = torch.randint(-9, 10, (32, 96)).to(BF16)  # 96: a power of two would divide without rounding
    plan = RoundingPlan(BF16, BF16, (BF16,), None, BF16, mean=mean)

    results = launch("rms_norm", x, None, None, EPS, 0.0, plan)

    assert_same_bits(results, rms_norm_reference(x, None, None, EPS, 0.0, str(plan)))
    other = replace(plan, mean="mean" if mean != "mean" else "sum_divided")
    assert changed(results[1], rms_norm_reference(x, None, None, EPS, 0.0, str(other))[1]) > 0


@pytest.mark.parametrize("plan", [llama(BF16), gemma(BF16)])
def test_follows_the_plan_and_not_only_the_formula(launch, plan):
    x, weight = random(5, 5377), random(5377)

    y, _ = launch("rms_norm", x, weight, None, EPS, 1.0, plan)

    eager, _ = rms_norm_reference(x, weight, None, EPS, 1.0, str(plan))
    other = gemma(BF16) if plan == llama(BF16) else llama(BF16)
    elsewhere, _ = rms_norm_reference(x, weight, None, EPS, 1.0, str(other))
    # The sums of squares differ in the last bits of float32. Each such bit moves a value across a
    # boundary of bfloat16 about once in 2^16, at each of the two roundings.
    last_bits = 8 * 2 * torch.finfo(F32).eps / torch.finfo(BF16).eps
    assert changed(y, eager) <= last_bits < changed(y, elsewhere)


@pytest.mark.parametrize("shape", [(), (1,)])
def test_eps_of_a_buffer(launch, shape):
    x, weight, plan = integers(1, 64).expand(3, 64), random(64), llama(BF16)
    eps = torch.full(shape, 11.0)  # 25 + 11 has a root, so that the bits are known

    results = launch("rms_norm", x, weight, eps, 0.0, 0.0, plan)

    assert_same_bits(results, rms_norm_reference(x, weight, eps, 0.0, 0.0, str(plan)))


def test_numbers_are_exact_in_float64(launch):
    x, weight, plan = integers(4, 64, dtype=F64), random(64, dtype=F64), RoundingPlan.once(F64, F64)

    results = launch("rms_norm", x, weight, None, 0.1, 0.1, plan)

    assert_same_bits(results, rms_norm_reference(x, weight, None, 0.1, 0.1, str(plan)))


def test_weight_of_any_stride(launch):
    x, weight, plan = integers(4, 64), random(64, 2)[:, 0], llama(BF16)

    results = launch("rms_norm", x, weight, None, 0.0, 0.0, plan)

    assert_same_bits(results, rms_norm_reference(x, weight, None, 0.0, 0.0, str(plan)))


def test_leaves_out_what_nobody_reads(launch):
    x, weight = random(4, 64), random(64)

    y, rstd = launch("rms_norm", x, weight, None, EPS, 0.0, llama(BF16), store_rstd=False)

    assert rstd is None
    assert_same_bits((y,), launch("rms_norm", x, weight, None, EPS, 0.0, llama(BF16))[:1])
