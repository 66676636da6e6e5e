"""Gradients of gates and modulations on a GPU: against float64, inside Inductor, and their bits."""

import copy

import pytest
import torch
from torch import nn

import normfuse
from normfuse.ops.gated_rms_norm_backward import (
    GATED_RMS_NORM_BACKWARD,
    gated_rms_norm_backward_fake,
    gated_rms_norm_backward_reference,
)
from normfuse.ops.gating import ACTIVATIONS
from normfuse.ops.modulated_rms_norm_backward import (
    MODULATED_RMS_NORM_BACKWARD,
    modulated_rms_norm_backward_fake,
    modulated_rms_norm_backward_reference,
)
from normfuse.ops.rounding import RoundingPlan
from tests import float64
from tests import gated_blocks as blocks
from tests.kernels import test_gated_rms_norm_backward as gated
from tests.kernels import test_modulated_rms_norm_backward as modulated
from tests.kernels.backward import assert_errs_no_more_than
from tests.kernels.inputs import BF16, F16, F32, PAIRS, VIEWS, gemma, layouts, random
from tests.kernels.test_modulated_rms_norm import MODULATORS
from tests.test_training import gradients

pytestmark = pytest.mark.gpu
PLAN = str(gemma(BF16))
# Held in registers by 4, 8 and 16 warps, misaligned, and too wide for them.
WIDTHS = (64, 256, 2816, 5377, 8192, 12288)
BOTH_ORDERS = pytest.mark.parametrize("gate_first", [False, True], ids=["gate last", "gate first"])


@pytest.fixture(autouse=True)
def on_device(device):
    """Every tensor is made on the device, and every `torch.empty` comes filled with NaN."""
    torch.use_deterministic_algorithms(True)
    with torch.device(device):
        yield
    torch.use_deterministic_algorithms(False)


def gated_backward(*arguments, plan=PLAN, mask=(True,) * 3):
    arguments = (*gated.with_rstd(*arguments), plan, list(mask))

    grads = GATED_RMS_NORM_BACKWARD(*arguments)

    assert_errs_no_more_than(gated_rms_norm_backward_reference, grads, *arguments)
    if all(mask) and arguments[3] is not None:
        assert layouts(grads) == layouts(gated_rms_norm_backward_fake(*arguments))
    return grads


def modulated_backward(*arguments, plan=PLAN, mask=(True,) * 4):
    arguments = (*modulated.with_rstd(*arguments), plan, list(mask))

    grads = MODULATED_RMS_NORM_BACKWARD(*arguments)

    assert_errs_no_more_than(modulated_rms_norm_backward_reference, grads, *arguments)
    if all(mask):
        assert layouts(grads) == layouts(modulated_rms_norm_backward_fake(*arguments))
    return grads


@pytest.mark.parametrize("dtype", [BF16, F16, F32])
@pytest.mark.parametrize("width", WIDTHS)
@BOTH_ORDERS
def test_gate(gate_first, width, dtype):
    rows = [random(300, width, dtype=dtype) for _ in range(3)]
    plan = str(RoundingPlan.once(dtype, dtype))

    gated_backward(*rows, random(width, dtype=dtype), 1.0, 1, gate_first, plan=plan)


@pytest.mark.parametrize("shared", [False, True], ids=["own weights", "one weight"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@BOTH_ORDERS
def test_gate_of_groups(gate_first, activation, shared):
    rows = [random(2, 300, 4096) for _ in range(3)]

    gated_backward(*rows, random(512 if shared else 4096), 0.0, 8, gate_first, activation)


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("groups", [1, 4])
def test_gate_of_rows_of_any_strides(groups, pair):
    x, gate = PAIRS[pair]()

    gated_backward(random(*x.shape), x, gate, random(64), 0.0, groups, False)


@pytest.mark.parametrize("dtype", [BF16, F16, F32])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("rows", [(3, 1), (3, 130)], ids=["a sequence", "a row"])
def test_modulation(rows, width, dtype):
    tensors = [random(3, 130, width, dtype=dtype) for _ in range(2)]
    scale, shift = random(*rows, 2 * width, dtype=dtype).chunk(2, dim=-1)
    plan = str(RoundingPlan.once(dtype, dtype))

    modulated_backward(*tensors, scale, shift, random(width, dtype=dtype), 1.0, 1.0, plan=plan)


@pytest.mark.parametrize("shift", MODULATORS)
@pytest.mark.parametrize("scale", MODULATORS)
def test_modulation_broadcasts(scale, shift):
    rows = random(2, 3, 5, 64), random(2, 3, 5, 64)

    modulated_backward(*rows, MODULATORS[scale](), MODULATORS[shift](), random(64), 0.0, 1.0)


@pytest.mark.parametrize("view", VIEWS)
def test_modulation_of_rows_of_any_strides(view):
    x = VIEWS[view]()

    modulated_backward(random(*x.shape), x, random(64), random(*x.shape), random(64), 0.0, 1.0)


@pytest.mark.parametrize("width", [256, 4096, 16384])
def test_the_same_bits_every_time(width):
    rows = [random(8, 700, width) for _ in range(3)]
    gates = (*gated.with_rstd(*rows, random(width), 1.0, 2, True), PLAN, [True] * 3)
    scale, shift, weight = random(8, 1, width), random(8, 1, width), random(width)
    modulators = modulated.with_rstd(*rows[:2], scale, shift, weight, 1.0, 1.0)

    for op, arguments in (
        (GATED_RMS_NORM_BACKWARD, gates),
        (MODULATED_RMS_NORM_BACKWARD, (*modulators, PLAN, [True] * 4)),
    ):
        first, *others = (op(*arguments) for _ in range(5))
        for grads in others:
            assert all(torch.equal(*pair) for pair in zip(first, grads, strict=True))


class Modulated(nn.Module):
    """Llama's norm of 256 columns, in float32, and a modulation."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(256) + 0.5)

    def forward(self, x, scale, shift):
        h = x.float()
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
        return (self.weight.float() * h * (1 + scale.float()) + shift.float()).to(x.dtype)


def exact_qwen(block, x, gate):
    return float64.gated_rms_norm(x, gate, block.weight, 1e-6, 0.0, 1, False, "silu")


def exact_mamba(block, x, gate):
    return float64.gated_rms_norm(x, gate, block.weight, 1e-6, 0.0, 1, True, "silu")


def exact_modulated(block, x, scale, shift):
    return float64.modulated_rms_norm(x, scale, shift, block.weight, 1e-6, 0.0, 1.0)


@pytest.mark.parametrize(
    ("make", "formula", "kernel", "sizes"),
    [
        (lambda: blocks.Qwen3NextRMSNormGated(256), exact_qwen, "gated", (65, 65)),
        (lambda: blocks.MambaRMSNormGated(256), exact_mamba, "gated", (65, 65)),
        (Modulated, exact_modulated, "modulated", (65, 1, 1)),
    ],
    ids=["gate last", "gate first", "modulation"],
)
def test_a_compiled_step_has_eagers_gradients_and_calls_no_op(make, formula, kernel, sizes):
    from torch._inductor.utils import run_and_get_code

    block = make().bfloat16()
    inputs = [random(2, size, 256).requires_grad_() for size in sizes]
    upstream = random(2, 65, 256)
    model = torch.compile(block, options=normfuse.options(lowering="triton"))

    with torch._inductor.config.patch(force_disable_caches=True):
        ours, codes = run_and_get_code(lambda: gradients(model, block, inputs, upstream))

    code = "\n".join(codes)
    assert f"{kernel}_rms_norm_backward_kernel" in code
    assert "torch.ops.normfuse" not in code
    eager = gradients(block, block, inputs, upstream)
    wide = copy.deepcopy(block).double()
    wide_inputs = [tensor.detach().double().requires_grad_() for tensor in inputs]
    exact = gradients(lambda *t: formula(wide, *t), wide, wide_inputs, upstream.double())
    for one, expected, reference in zip(ours, eager, exact, strict=True):
        float64.assert_as_close_as_eager(one, expected, reference)
