"""The kernel of `gated_rms_norm` on a GPU, against float64 and against eager on the same GPU."""

import pytest
import torch

import normfuse
from normfuse.ops import GATED_RMS_NORM
from normfuse.ops.gated_rms_norm import gated_rms_norm_fake, gated_rms_norm_reference
from normfuse.ops.gating import ACTIVATIONS, Gating
from normfuse.ops.rounding import RoundingPlan
from tests import float64
from tests import gated_blocks as blocks
from tests.kernels.inputs import BF16, F16, F32, F64, PAIRS, gemma, layouts, random

pytestmark = pytest.mark.gpu
EPS = 1e-6
BOTH_ORDERS = pytest.mark.parametrize("gate_first", [False, True], ids=["gate last", "gate first"])


@pytest.fixture(autouse=True)
def on_device(device):
    """Every tensor is made on the device, and every `torch.empty` comes filled with NaN."""
    torch.use_deterministic_algorithms(True)
    with torch.device(device):
        yield
    torch.use_deterministic_algorithms(False)


def assert_errs_no_more_than_eager(x, gate, weight, groups, gate_first, activation, plan, types):
    norm = (EPS, 1.0, groups, gate_first, activation)
    arguments = (x, gate, weight, *norm, str(plan), str(types))

    results = GATED_RMS_NORM(*arguments)

    exact = float64.gated_rms_norm(x, gate, weight, *norm)
    float64.assert_as_close_as_eager(results[0], gated_rms_norm_reference(*arguments)[0], exact)
    assert layouts(results) == layouts(gated_rms_norm_fake(*arguments))


@pytest.mark.parametrize("dtype", [BF16, F16, F32])
@pytest.mark.parametrize(("width", "groups"), [(128, 1), (769, 1), (8192, 8), (70000, 1)])
@BOTH_ORDERS
def test_errs_no_more_than_eager(gate_first, width, groups, dtype):
    x, gate = random(130, width, dtype=dtype), random(130, width, dtype=dtype)
    types = Gating.once(F32 if gate_first else dtype)
    plan = gemma(dtype if gate_first else F32)
    weight = random(width, dtype=dtype)
    assert_errs_no_more_than_eager(x, gate, weight, groups, gate_first, "silu", plan, types)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [F32, F64])
@BOTH_ORDERS
def test_activations(gate_first, dtype, activation):
    x, gate, weight = random(64, 256), 8 * random(64, 256), random(256)
    plan, types = RoundingPlan.once(dtype, BF16), Gating.once(dtype)
    assert_errs_no_more_than_eager(x, gate, weight, 1, gate_first, activation, plan, types)


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("groups", [1, 4])
@BOTH_ORDERS
def test_takes_rows_of_any_strides(gate_first, groups, pair):
    types = Gating.once(F32 if gate_first else BF16)
    plan = gemma(BF16 if gate_first else F32)
    operands = (*PAIRS[pair](), random(64))
    assert_errs_no_more_than_eager(*operands, groups, gate_first, "silu", plan, types)


@pytest.mark.parametrize(
    "block",
    [
        blocks.Qwen3NextRMSNormGated,
        blocks.KimiLinearRMSNormGated,
        blocks.MambaRMSNormGated,
        blocks.FalconH1RMSNormGated,
    ],
)
def test_compiled_blocks_err_no_more_than_eager(block, device):
    block = block(256).to(device, BF16)
    x, gate = random(2, 65, 256), random(2, 65, 512)[..., 256:]
    with torch.no_grad():
        y = torch.compile(block, options=normfuse.options(lowering="triton"))(x, gate)
        expected = block(x, gate)
    wide = block.double()(x.double(), gate.double())  # but for its casts to float32
    float64.assert_as_close_as_eager(y, expected, wide)
