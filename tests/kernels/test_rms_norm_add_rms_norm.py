"""The kernel of `rms_norm_add_rms_norm`, interpreted."""

import pytest
import torch

from normfuse.ops.residual_sum import Scales
from normfuse.ops.rms_norm_add_rms_norm import (
    rms_norm_add_rms_norm_fake,
    rms_norm_add_rms_norm_reference,
)
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

STEM = "rms_norm_add_rms_norm"


def assert_errs_no_more_than_eager(results, tensors, scales, norm_1, norm_2):
    x, residual, weight_1, weight_2 = tensors
    eager = reference(*tensors, scales, norm_1, norm_2)
    branch = float64.rms_norm(x, weight_1, *norm_1[:2])
    total = float64.residual_sum(branch, residual, scales)
    float64.assert_as_close_as_eager(results[1], eager[1], total)
    y = float64.rms_norm(total, weight_2, *norm_2[:2])
    float64.assert_as_close_as_eager(results[0], eager[0], y)


def reference(x, residual, weight_1, weight_2, scales, norm_1, norm_2):
    norms = (*norm_1[:2], str(norm_1[2]), *norm_2[:2], str(norm_2[2]))
    return rms_norm_add_rms_norm_reference(x, residual, weight_1, weight_2, *scales, *norms)


def operands(*shape, dtype=BF16):
    return random(*shape, dtype=dtype), random(*shape, dtype=dtype), *weights(shape[-1], dtype)


def weights(width, dtype=BF16):
    return random(width, dtype=dtype), random(width, dtype=dtype)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("width", WIDTHS)
def test_errs_no_more_than_eager(launch, width, dtype):
    tensors = operands(4, width, dtype=dtype)
    norms = (1e-6, 1.0, gemma(dtype)), (1e-5, 0.0, llama(dtype))

    results = launch(STEM, *tensors, Scales(), *norms[0], *norms[1])

    assert_errs_no_more_than_eager(results, tensors, Scales(), *norms)


@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize("dtype", [BF16, F32])
def test_scales(launch, scales, dtype):
    x, residual, *pair = integers(4, 64, dtype=dtype), random(4, 64, dtype=dtype), *weights(64)
    norms = (0.0, 1.0, gemma(dtype)), (1e-5, 1.0, gemma(dtype))

    results = launch(STEM, x, residual, *pair, SCALES[scales], *norms[0], *norms[1])

    eager = reference(x, residual, *pair, SCALES[scales], *norms)
    assert_same_bits(results[1:3], eager[1:3])  # the second statistic is summed in another order
    assert_errs_no_more_than_eager(results, (x, residual, *pair), SCALES[scales], *norms)


@pytest.mark.parametrize("plan", [llama(BF16), gemma(BF16)])
def test_the_first_norm_has_the_bits_of_its_plan(launch, plan):
    x, residual, *pair = integers(4, 64), random(4, 64), *weights(64)
    norms = (0.0, 1.0, plan), (1e-5, 0.0, llama(BF16))

    _, total, rstd_1, _ = launch(STEM, x, residual, *pair, Scales(), *norms[0], *norms[1])

    assert_same_bits((total, rstd_1), reference(x, residual, *pair, Scales(), *norms)[1:3])
    other = gemma(BF16) if plan == llama(BF16) else llama(BF16)
    elsewhere = reference(x, residual, *pair, Scales(), (0.0, 1.0, other), norms[1])
    assert changed(total, elsewhere[1]) > 0


@pytest.mark.parametrize("plan", [llama(BF16), gemma(BF16)])
def test_the_second_norm_has_the_bits_of_its_plan(launch, plan):
    x, residual, zeros, weight_2 = (
        random(4, 64),
        integers(4, 64),
        torch.zeros(64).to(BF16),
        random(64),
    )
    tensors = (x, residual, zeros, weight_2)  # no branch: the second statistic is of integers
    norms = (1e-5, 0.0, llama(BF16)), (0.0, 1.0, plan)

    y, total, _, rstd_2 = launch(STEM, *tensors, Scales(), *norms[0], *norms[1])

    eager = reference(*tensors, Scales(), *norms)
    assert_same_bits((y, total, rstd_2), (*eager[:2], eager[3]))
    other = gemma(BF16) if plan == llama(BF16) else llama(BF16)
    assert changed(y, reference(*tensors, Scales(), norms[0], (0.0, 1.0, other))[0]) > 0


@pytest.mark.parametrize(
    ("x", "residual", "weight"),
    [(BF16, F32, BF16), (F32, BF16, F32), (F16, BF16, F32), (BF16, F64, F64), (F64, F16, BF16)],
)
def test_mixed_types(launch, x, residual, weight):
    x, residual, *pair = (
        integers(4, 64, dtype=x),
        random(4, 64, dtype=residual),
        *weights(64, weight),
    )
    plan_1 = RoundingPlan.before_weight(x.dtype, weight)
    plan_2 = RoundingPlan.before_weight(torch.promote_types(plan_1.out, residual.dtype), weight)
    norms = (0.0, 0.0, plan_1), (1e-5, 0.0, plan_2)

    results = launch(STEM, x, residual, *pair, Scales(branch=0.22), *norms[0], *norms[1])

    eager = reference(x, residual, *pair, Scales(branch=0.22), *norms)
    assert_same_bits(results[1:3], eager[1:3])
    assert_errs_no_more_than_eager(results, (x, residual, *pair), Scales(branch=0.22), *norms)


def test_weightless_norms(launch):
    x, residual = integers(4, 64), random(4, 64)
    plan = RoundingPlan(F32, F32, (F32, BF16), None, BF16)

    results = launch(STEM, x, residual, None, None, Scales(), 0.0, 0.0, plan, 1e-5, 0.0, plan)

    norms = (0.0, 0.0, plan), (1e-5, 0.0, plan)
    assert_errs_no_more_than_eager(results, (x, residual, None, None), Scales(), *norms)


@pytest.mark.parametrize("pair", PAIRS)
def test_takes_rows_of_any_strides(launch, pair):
    tensors = (*PAIRS[pair](), *weights(64))
    norms = (1e-6, 1.0, llama(BF16)), (1e-5, 0.0, gemma(BF16))

    results = launch(STEM, *tensors, Scales(), *norms[0], *norms[1])

    assert_errs_no_more_than_eager(results, tensors, Scales(), *norms)
    plans = (1e-6, 1.0, str(llama(BF16)), 1e-5, 0.0, str(gemma(BF16)))
    assert layouts(results) == layouts(rms_norm_add_rms_norm_fake(*tensors, *Scales(), *plans))


@pytest.mark.parametrize("shape", [(0, 64), (2, 0, 3, 64)])
def test_no_rows(launch, shape):
    tensors = (*(torch.ones(shape, dtype=BF16),) * 2, *weights(64))
    norms = (1e-6, 1.0, llama(BF16), 1e-5, 0.0, gemma(BF16))

    results = launch(STEM, *tensors, Scales(), *norms)

    plans = (1e-6, 1.0, str(llama(BF16)), 1e-5, 0.0, str(gemma(BF16)))
    assert layouts(results) == layouts(rms_norm_add_rms_norm_fake(*tensors, *Scales(), *plans))


@pytest.mark.parametrize("stored", [(), ("total",), ("rstd_1",), ("rstd_2",)])
def test_leaves_out_what_nobody_reads(launch, stored):
    arguments = (STEM, *operands(3, 64), Scales(), 1e-6, 0.0, llama(BF16), 1e-6, 0.0, llama(BF16))
    flags = [name in stored for name in ("total", "rstd_1", "rstd_2")]

    results = launch(*arguments, store_total=flags[0], store_rstd_1=flags[1], store_rstd_2=flags[2])

    assert [result is not None for result in results] == [True, *flags]
    assert_same_bits(results, launch(*arguments))


@pytest.mark.parametrize("flag", [True, False])
def test_reads_a_wide_row_in_chunks(launch, flag, narrow_tile):
    tensors = (*PAIRS["x sliced"](), *weights(64))
    norms = (1e-6, 1.0, gemma(BF16)), (1e-5, 0.0, gemma(BF16))
    arguments = (STEM, *tensors, SCALES["numbers"], *norms[0], *norms[1])

    y, total, *_ = launch(*arguments, tile=narrow_tile, store_total=flag)

    whole = launch(*arguments)
    total = total if flag else whole[1]
    assert_errs_no_more_than_eager((y, total), tensors, SCALES["numbers"], *norms)
