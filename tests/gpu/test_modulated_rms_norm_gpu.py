"""The kernel of `modulated_rms_norm` on a GPU, against float64 and eager on the same GPU."""

import pytest
import torch

from normfuse.ops import MODULATED_RMS_NORM
from normfuse.ops.modulated_rms_norm import modulated_rms_norm_fake, modulated_rms_norm_reference
from normfuse.ops.modulation import Modulation
from normfuse.ops.rounding import RoundingPlan
from tests import float64
from tests.kernels.inputs import (
    BF16,
    F16,
    F32,
    VIEWS,
    assert_same_bits,
    gemma,
    integers,
    layouts,
    random,
)

pytestmark = pytest.mark.gpu
EPS = 1e-6


@pytest.fixture(autouse=True)
def on_device(device):
    """Every tensor is made on the device, and every `torch.empty` comes filled with NaN."""
    torch.use_deterministic_algorithms(True)
    with torch.device(device):
        yield
    torch.use_deterministic_algorithms(False)


def assert_errs_no_more_than_eager(x, scale, shift, weight, plan, types):
    norm = (x, scale, shift, weight, EPS, 1.0, 1.0)
    arguments = (*norm, str(plan), str(types))

    results = MODULATED_RMS_NORM(*arguments)

    exact = float64.modulated_rms_norm(*norm)
    float64.assert_as_close_as_eager(results[0], modulated_rms_norm_reference(*arguments)[0], exact)
    assert layouts(results) == layouts(modulated_rms_norm_fake(*arguments))


@pytest.mark.parametrize("dtype", [BF16, F16, F32])
@pytest.mark.parametrize("width", [128, 769, 4096, 70000])
@pytest.mark.parametrize("rows", [(2, 65), (2, 1), (1, 1)])
def test_errs_no_more_than_eager(rows, width, dtype):
    x, weight = random(2, 65, width, dtype=dtype), random(width, dtype=dtype)
    scale, shift = (random(*rows, 2 * width, dtype=dtype)).chunk(2, dim=-1)
    types = Modulation.once(dtype)
    assert_errs_no_more_than_eager(x, scale, shift, weight, gemma(F32), types)


@pytest.mark.parametrize("view", VIEWS)
def test_takes_rows_of_any_strides(view):
    x = VIEWS[view]()
    plan, types = RoundingPlan.once(BF16, None), Modulation(*(BF16,) * 4)
    assert_errs_no_more_than_eager(x, random(64), random(*x.shape), None, plan, types)


@pytest.mark.parametrize("dtype", [BF16, F32])
def test_every_rounding_has_eagers_bits(dtype):
    """In float32 this also shows that no product is contracted with the sum that reads it."""
    x, scale, shift = integers(64, 64), random(64, 64, dtype=dtype), random(64, dtype=dtype)
    types = str(gemma(dtype)), str(Modulation(*(dtype,) * 4))
    arguments = (x, scale, shift, random(64), 0.0, 0.0, 1.0, *types)

    results = MODULATED_RMS_NORM(*arguments)

    assert_same_bits(results, modulated_rms_norm_reference(*arguments))
