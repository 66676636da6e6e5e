"""The kernel of `l2_norm`, which is that of `rms_norm` without the division, interpreted."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from normfuse.ops.l2_norm import l2_norm_fake, l2_norm_reference
from normfuse.ops.rounding import L2, ROOTS, RoundingPlan
from tests import float64
from tests.kernels.inputs import (
    BF16,
    F16,
    F32,
    VIEWS,
    WIDTHS,
    assert_same_bits,
    integers,
    layouts,
    random,
)

EPS = 1e-6


def once(dtype):
    return RoundingPlan.once(dtype, None).with_mean(L2)


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("width", WIDTHS)
def test_errs_no_more_than_eager(launch, width, dtype):
    x, plan = random(5, width, dtype=dtype), once(dtype)

    y, _ = launch("l2_norm", x, None, None, EPS, 0.0, plan)

    eager, _ = l2_norm_reference(x, None, EPS, str(plan))
    exact = x.double() / (x.double().square().sum(-1, keepdim=True) + EPS).sqrt()
    float64.assert_as_close_as_eager(y, eager, exact)


@pytest.mark.parametrize("root", ROOTS)
def test_every_root_has_eagers_bits(launch, root):
    x, plan = integers(4, 64), replace(once(BF16), root=root)

    results = launch("l2_norm", x, None, None, 0.0, 0.0, plan)

    assert_same_bits(results, l2_norm_reference(x, None, 0.0, str(plan)))


@pytest.mark.parametrize("eps", [1e-12, 30.0, torch.tensor(30.0)])
def test_a_bounded_root_has_eagers_bits(launch, eps):
    """Rows below the bound and above it, of zeros, and of what is no number."""
    x = integers(4, 64) * torch.tensor([[0.0], [0.25], [1.0], [8.0]], dtype=BF16)
    x[3, 5] = float("nan")
    plan = replace(once(BF16), root="divide_by_sqrt", bounded=True)
    number, tensor = (0.0, eps) if isinstance(eps, torch.Tensor) else (eps, None)

    results = launch("l2_norm", x, None, tensor, number, 0.0, plan)

    for ours, eager in zip(results, l2_norm_reference(x, tensor, number, str(plan)), strict=True):
        assert torch.equal(ours.nan_to_num(7.0), eager.nan_to_num(7.0))
    assert torch.equal(
        results[0].nan_to_num(7.0),
        F.normalize(x.float(), dim=-1, eps=float(eps)).to(BF16).nan_to_num(7.0),
    )


@pytest.mark.parametrize("view", VIEWS)
def test_takes_rows_of_any_strides(launch, view):
    x, plan = VIEWS[view](), once(BF16)

    results = launch("l2_norm", x, None, None, EPS, 0.0, plan)

    assert layouts(results) == layouts(l2_norm_fake(x, None, EPS, str(plan)))
    eager, _ = l2_norm_reference(x, None, EPS, str(plan))
    exact = x.double() / (x.double().square().sum(-1, keepdim=True) + EPS).sqrt()
    float64.assert_as_close_as_eager(results[0], eager, exact)
