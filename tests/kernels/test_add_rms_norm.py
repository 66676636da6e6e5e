"""The kernel of `add_rms_norm`, interpreted."""

import pytest
import torch

from normfuse.ops.add_rms_norm import add_rms_norm_fake, add_rms_norm_reference
from normfuse.ops.residual_sum import Scales
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
    """The sum has eager's bits; the norm, whose squares add up in another order, its errors."""
    y, total, _ = results
    eager = add_rms_norm_reference(x, residual, weight, *scales, EPS, offset, str(plan))
    assert_same_bits((total,), eager[1:2])
    exact = float64.rms_norm(float64.residual_sum(x, residual, scales), weight, EPS, offset)
    float64.assert_as_close_as_eager(y, eager[0], exact)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("width", WIDTHS)
def test_errs_no_more_than_eager(launch, width, dtype):
    x, residual, weight = (random(*shape, dtype=dtype) for shape in [(4, width)] * 2 + [(width,)])
    plan = llama(dtype)

    results = launch("add_rms_norm", x, residual, weight, Scales(), EPS, 1.0, plan)

    assert_follows_eager(results, x, residual, weight, Scales(), 1.0, plan)


@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize("dtype", [BF16, F32])
def test_scales(launch, scales, dtype):
    x, residual, weight = random(3, 96, dtype=dtype), random(3, 96, dtype=dtype), random(96)
    plan, factors = gemma(BF16), SCALES[scales]

    results = launch("add_rms_norm", x, residual, weight, factors, EPS, 0.0, plan)

    assert_follows_eager(results, x, residual, weight, factors, 0.0, plan)


@pytest.mark.parametrize(
    ("x", "residual", "weight"),
    [(BF16, F32, BF16), (F32, BF16, F32), (F16, BF16, F32), (BF16, F64, F64), (F64, F16, BF16)],
)
def test_mixed_types(launch, x, residual, weight):
    x, residual, weight = (
        random(3, 64, dtype=x),
        random(3, 64, dtype=residual),
        random(64, dtype=weight),
    )
    scales, plan = Scales(branch=0.22), llama(torch.promote_types(x.dtype, residual.dtype))

    results = launch("add_rms_norm", x, residual, weight, scales, EPS, 0.0, plan)

    assert_follows_eager(results, x, residual, weight, scales, 0.0, plan)


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("scales", ["none", "numbers"])
def test_takes_rows_of_any_strides(launch, pair, scales):
    (x, residual), weight, factors, plan = PAIRS[pair](), random(64), SCALES[scales], llama(BF16)

    results = launch("add_rms_norm", x, residual, weight, factors, EPS, 1.0, plan)

    assert_follows_eager(results, x, residual, weight, factors, 1.0, plan)
    fakes = add_rms_norm_fake(x, residual, weight, *factors, EPS, 1.0, str(plan))
    assert layouts(results) == layouts(fakes)


@pytest.mark.parametrize("plan", [llama(BF16), gemma(BF16)])
def test_has_the_bits_of_its_plan(launch, plan):
    total, weight = integers(4, 64), random(64)
    x = (total - 1).clone()  # the sum with ones is exact: all that rounds is the norm

    results = launch("add_rms_norm", x, torch.ones(4, 64), weight, Scales(), 0.0, 1.0, plan)

    eager = add_rms_norm_reference(x, torch.ones(4, 64), weight, *Scales(), 0.0, 1.0, str(plan))
    assert_same_bits(results, eager)
    other = gemma(BF16) if plan == llama(BF16) else llama(BF16)
    elsewhere = add_rms_norm_reference(
        x, torch.ones(4, 64), weight, *Scales(), 0.0, 1.0, str(other)
    )
    assert changed(results[0], elsewhere[0]) > 0


@pytest.mark.parametrize("shape", [(0, 64), (2, 0, 3, 64)])
def test_no_rows(launch, shape):
    x, plan = torch.ones(shape, dtype=BF16), llama(BF16)

    results = launch("add_rms_norm", x, x.float(), torch.ones(64), Scales(), EPS, 0.0, plan)

    fakes = add_rms_norm_fake(x, x.float(), torch.ones(64), *Scales(), EPS, 0.0, str(plan))
    assert layouts(results) == layouts(fakes)


@pytest.mark.parametrize("flags", [(False, False), (True, False), (False, True)])
def test_leaves_out_what_nobody_reads(launch, flags):
    x, residual, weight = random(3, 64), random(3, 64), random(64)
    arguments = ("add_rms_norm", x, residual, weight, Scales(), EPS, 0.0, llama(BF16))

    results = launch(*arguments, store_total=flags[0], store_rstd=flags[1])

    assert [result is not None for result in results] == [True, *flags]
    assert_same_bits(results, launch(*arguments))


@pytest.mark.parametrize("flag", [True, False])
def test_reads_a_wide_row_in_chunks(launch, flag, narrow_tile):
    x, weight, plan = integers(5, 64) / 2, random(64), gemma(BF16)
    residual = x.clone()  # the sum is integers again, and exact

    results = launch(
        "add_rms_norm", x, residual, weight, Scales(), 0.0, 1.0, plan,
        tile=narrow_tile, store_total=flag,
    )  # fmt: skip

    eager = add_rms_norm_reference(x, residual, weight, *Scales(), 0.0, 1.0, str(plan))
    assert_same_bits(results, eager)
