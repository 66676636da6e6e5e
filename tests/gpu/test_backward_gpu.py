"""Gradients on a GPU: the kernels against float64, inside Inductor, their bits and their memory."""

import copy

import pytest
import torch
from torch import nn

import normfuse
from normfuse.ops.add_rms_norm_backward import (
    ADD_RMS_NORM_BACKWARD,
    add_rms_norm_backward_reference,
)
from normfuse.ops.qk_rms_norm_rope_backward import (
    QK_RMS_NORM_ROPE_BACKWARD,
    qk_rms_norm_rope_backward_reference,
)
from normfuse.ops.rms_norm_add_rms_norm_backward import (
    RMS_NORM_ADD_RMS_NORM_BACKWARD,
    rms_norm_add_rms_norm_backward_reference,
)
from normfuse.ops.rms_norm_backward import RMS_NORM_BACKWARD, rms_norm_backward_reference
from normfuse.ops.rounding import RoundingPlan
from tests.blocks import GemmaBlock, GemmaRMSNorm, LlamaBlock, LlamaRMSNorm
from tests.float64 import assert_as_close_as_eager
from tests.kernels.backward import assert_errs_no_more_than, rstd_of
from tests.kernels.inputs import BF16, F16, F32, gemma, random
from tests.kernels.test_qk_rms_norm_rope import queries_and_keys, rotation, tables
from tests.test_training import exact_gemma, exact_llama, gradients

pytestmark = pytest.mark.gpu
PLAN = str(gemma(BF16))
# Held in registers by 2, 4, 8 and 16 warps, misaligned, and too wide for them.
WIDTHS = (64, 256, 1000, 1024, 2816, 4096, 5376, 5377, 8192, 12288, 16384)
MANY_ROWS = 32768  # two of which a program takes at once


@pytest.fixture(autouse=True)
def on_device(device):
    """Every tensor is made on the device, and every `torch.empty` comes filled with NaN."""
    torch.use_deterministic_algorithms(True)
    with torch.device(device):
        yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", [BF16, F16, F32])
@pytest.mark.parametrize("width", WIDTHS)
def test_norm(width, dtype):
    x, plan = random(300, width, dtype=dtype), str(RoundingPlan.once(dtype, dtype))
    tensors = (random(300, width, dtype=dtype), x, random(width, dtype=dtype), rstd_of(x))
    arguments = (*tensors, 1.0, plan, [True, True])

    grads = RMS_NORM_BACKWARD(*arguments)

    assert_errs_no_more_than(rms_norm_backward_reference, grads, *arguments)


@pytest.mark.parametrize("width", [1152, 2816, 4096])
def test_two_rows_at_once(width):
    x = random(MANY_ROWS + 1, width)
    tensors = (random(MANY_ROWS + 1, width), x, random(width), rstd_of(x))
    arguments = (*tensors, 1.0, PLAN, [True, True])

    grads = RMS_NORM_BACKWARD(*arguments)

    assert_errs_no_more_than(rms_norm_backward_reference, grads, *arguments)


@pytest.mark.parametrize("width", WIDTHS)
def test_sum_and_norm(width):
    total = random(300, width)
    tensors = (random(300, width), random(300, width), total, random(width), rstd_of(total))
    scales = (None, torch.tensor(0.7), 0.22, None)
    arguments = (*tensors, *scales, 0.0, PLAN, BF16, F32, [True, True, True])

    grads = ADD_RMS_NORM_BACKWARD(*arguments)

    assert_errs_no_more_than(add_rms_norm_backward_reference, grads, *arguments)


@pytest.mark.parametrize("width", WIDTHS)
def test_sandwich(width):
    x, total = random(300, width), random(300, width)
    tensors = (random(300, width), random(300, width), x, total, random(width), random(width))
    norms = (rstd_of(x), rstd_of(total), None, None, None, None, 1.0, PLAN, 1.0, PLAN)
    arguments = (*tensors, *norms, BF16, [True] * 4)

    grads = RMS_NORM_ADD_RMS_NORM_BACKWARD(*arguments)

    assert_errs_no_more_than(rms_norm_add_rms_norm_backward_reference, grads, *arguments)


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("name", ["half", "interleaved", "partial", "in the middle"])
def test_queries_and_keys(name, kept):
    xs, numbers = queries_and_keys(random, BF16), ([1e-6] * 2, [1.0] * 2, [PLAN] * 2)
    grads, weights = [random(*x.shape) for x in xs], [random(64) for _ in xs]
    rstds = [rstd_of(x) for x in xs] if kept else []
    tensors = [xs, grads, weights, rstds, *tables(name, BF16)]
    rest = (*numbers, [rotation(name, BF16)] * 2, [True] * 4)

    found = QK_RMS_NORM_ROPE_BACKWARD(*tensors, *rest)

    plain = qk_rms_norm_rope_backward_reference(*tensors, *rest)
    wide = [[t.double() for t in a] if isinstance(a, list) else a.double() for a in tensors]
    exact = qk_rms_norm_rope_backward_reference(*wide, *rest)
    for one, expected, reference in zip(found, plain, exact, strict=True):
        assert_as_close_as_eager(one, expected, reference)


@pytest.mark.guarantee
@pytest.mark.parametrize(
    ("rows", "width"), [(5000, 256), (5000, 1024), (5000, 4096), (5000, 16384), (MANY_ROWS, 4096)]
)
def test_the_same_bits_every_time(rows, width):
    x = random(rows, width)
    arguments = (random(rows, width), x, random(width), rstd_of(x), 1.0, PLAN, [True, True])

    first, *others = (RMS_NORM_BACKWARD(*arguments) for _ in range(5))

    for grads in others:
        assert all(torch.equal(*pair) for pair in zip(first, grads, strict=True))


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
@pytest.mark.parametrize(
    ("block_class", "formula"), [(LlamaBlock, exact_llama), (GemmaBlock, exact_gemma)]
)
def test_a_compiled_step_has_eagers_gradients(block_class, formula, mode):
    block = block_class().bfloat16()
    inputs = [random(32, 8).requires_grad_() for _ in range(2)]
    upstream = random(32, 8)

    model = torch.compile(block, options=normfuse.options(mode, lowering="triton"))
    for _ in range(3):  # CUDA graphs are recorded by the second call
        torch.compiler.cudagraph_mark_step_begin()
        ours = [t.clone() for t in gradients(model, block, inputs, upstream)]

    eager = gradients(block, block, inputs, upstream)
    wide = copy.deepcopy(block).double()
    wide_inputs = [tensor.detach().double().requires_grad_() for tensor in inputs]
    exact = gradients(lambda *t: formula(wide, *t), wide, wide_inputs, upstream.double())
    for one, expected, reference in zip(ours, eager, exact, strict=True):
        assert_as_close_as_eager(one, expected, reference)


def test_a_compiled_step_launches_kernels_and_calls_no_op():
    from torch._inductor.utils import run_and_get_code

    block = GemmaBlock().bfloat16()
    inputs = [random(32, 8).requires_grad_() for _ in range(2)]
    model = torch.compile(block, options=normfuse.options(lowering="triton"))

    with torch._inductor.config.patch(force_disable_caches=True):
        _, codes = run_and_get_code(lambda: model(*inputs).sum().backward())

    code = "\n".join(codes)
    assert "rms_norm_add_rms_norm_backward_kernel" in code
    assert "torch.ops.normfuse" not in code


class WideBlock(nn.Module):
    """A norm behind a residual add, at a width at which activations fill the memory."""

    def __init__(self, norm_class):
        super().__init__()
        self.norm = norm_class(2048)
        self.branch = nn.Linear(2048, 2048, bias=False)

    def forward(self, x, residual):
        total = x + residual
        return total + self.branch(self.norm(total))


@pytest.mark.parametrize("norm_class", [LlamaRMSNorm, GemmaRMSNorm])
def test_a_step_takes_no_more_memory_than_plain_inductor(norm_class):
    def peak(**settings):
        torch._dynamo.reset()
        model = torch.compile(WideBlock(norm_class).bfloat16(), **settings)
        inputs = [random(8192, 2048).requires_grad_() for _ in range(2)]
        for _ in range(2):
            torch.cuda.reset_peak_memory_stats()
            model(*inputs).sum().backward()
        return torch.cuda.max_memory_allocated()

    ours = peak(options=normfuse.options(lowering="triton"))
    # Four programs of a multiprocessor keep a row of sums each, until these are added up.
    partial_sums = 4 * 132 * 2048 * 4
    assert ours <= peak() + partial_sums
