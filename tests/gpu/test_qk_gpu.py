"""QK-norm and RoPE on a GPU: the kernel against eager and float64, and inside Inductor."""

import copy

import pytest
import torch

import normfuse
from normfuse.ops.qk_rms_norm import qk_rms_norm_reference
from normfuse.ops.qk_rms_norm_rope import qk_rms_norm_rope_fake, qk_rms_norm_rope_reference
from normfuse.ops.rope import rope_fake, rope_reference
from normfuse.ops.rounding import RoundingPlan
from tests import float64, rotary
from tests.blocks import Gemma4WeightlessNorm, GemmaRMSNorm
from tests.kernels.inputs import (
    BF16,
    F16,
    F32,
    F64,
    assert_same_bits,
    gemma,
    integers,
    layouts,
    llama,
    random,
)
from tests.test_joint_norms import Spelled as JointNorms

pytestmark = pytest.mark.gpu
EPS = 1e-6
SHORT = {BF16: "bf16", F16: "f16", F32: "f32", F64: "f64"}


@pytest.fixture(autouse=True)
def on_device(device):
    """Every tensor is made on the device, and every `torch.empty` comes filled with NaN."""
    torch.use_deterministic_algorithms(True)
    with torch.device(device):
        yield
    torch.use_deterministic_algorithms(False)


def heads(make, tokens, num, width, dtype):
    """Heads first, in a projection that also holds others."""
    return make(2, tokens, num + 3, width, dtype=dtype)[:, :, 1 : num + 1].transpose(1, 2)


@pytest.mark.parametrize("layout", ["half", "interleaved", "complex"])
@pytest.mark.parametrize("dtype", [BF16, F16, F32, F64])
@pytest.mark.parametrize(("width", "dim"), [(64, 64), (128, 128), (256, 64), (512, 512), (96, 96)])
def test_every_rotation_has_eagers_bits(width, dim, dtype, layout):
    if width == 96 or (layout == "complex" and dtype == F64):
        pytest.skip("the rows of integers need a power of 2; complex tables are float32")
    wide = F32 if layout == "complex" else dtype
    columns = dim // 2 if layout == "complex" else dim
    xs = [heads(integers, 5, num, width, dtype) for num in (4, 2)]
    cos, sin = (random(2, 5, 1, columns, dtype=wide).transpose(1, 2) for _ in range(2))
    turn = f"{layout} {dim} in={SHORT[wide]} out={SHORT[dtype]}"
    plans = [str(llama(dtype)), str(RoundingPlan.once(dtype, dtype))]
    weights, numbers = [random(width, dtype=dtype) for _ in xs], ([0.0] * 2, [0.0, 1.0])
    arguments = (xs, weights, cos, sin, *numbers, plans, [turn] * 2)

    results = torch.ops.normfuse.qk_rms_norm_rope(*arguments)

    assert layouts(results) == layouts(qk_rms_norm_rope_fake(*arguments))
    if layout == "complex":  # eager's complex product contracts to FMAs
        expected = qk_rms_norm_rope_reference(*arguments)
        for result, other in zip(results, expected, strict=True):
            torch.testing.assert_close(result, other)
    else:
        assert_same_bits(results, qk_rms_norm_rope_reference(*arguments))


@pytest.mark.parametrize("layout", ["half", "interleaved"])
@pytest.mark.parametrize("dtype", [BF16, F16, F32, F64])
@pytest.mark.parametrize(("width", "dim"), [(64, 64), (128, 128), (128, 64), (512, 512), (96, 96)])
@pytest.mark.parametrize("tokens", [7, 2048])
def test_rope_without_a_norm_has_eagers_bits(tokens, width, dim, dtype, layout):
    xs = [heads(random, tokens, num, width, dtype) for num in (8, 2)]
    cos, sin = (random(1, 1, tokens, dim, dtype=dtype) for _ in range(2))
    turns = [f"{layout} {dim} in={SHORT[dtype]} out={SHORT[dtype]}"] * 2
    arguments = (xs, cos, sin, turns)

    results = torch.ops.normfuse.rope(*arguments)

    assert layouts(results) == layouts(rope_fake(*arguments))
    assert_same_bits(results, rope_reference(*arguments))


@pytest.mark.parametrize("dtype", [BF16, F16, F32])
@pytest.mark.parametrize("width", [64, 80, 128, 256, 512])
@pytest.mark.parametrize("tokens", [1, 7, 2048])
def test_errs_no_more_than_eager(tokens, width, dtype):
    xs = [heads(random, tokens, num, width, dtype) for num in (8, 2)]
    cos, sin = (random(1, 1, tokens, width, dtype=dtype) for _ in range(2))
    weights, numbers = [random(width, dtype=dtype) for _ in xs], ([EPS] * 2, [1.0] * 2)
    short = SHORT[dtype]
    turns = [f"half {width} in={short} out={short}"] * 2
    arguments = (xs, weights, cos, sin, *numbers, [str(gemma(dtype))] * 2, turns)

    results = torch.ops.normfuse.qk_rms_norm_rope(*arguments)

    eager = qk_rms_norm_rope_reference(*arguments)
    exact = float64.qk_rms_norm_rope(*arguments)
    for result, other, truth in zip(results[:2], eager, exact, strict=False):
        float64.assert_as_close_as_eager(result, other, truth)


@pytest.mark.parametrize("width", [64, 128, 256, 512])
def test_a_tokens_bits_do_not_depend_on_how_many_there_are(width):
    """Of many tokens, a program takes more heads of one at a time."""
    xs = [heads(random, 4096, num, width, BF16) for num in (16, 8)]
    tables = [random(1, 1, 4096, width, dtype=BF16) for _ in range(2)]
    turns = [f"half {width} in=bf16 out=bf16"] * 2
    norms = ([EPS] * 2, [1.0] * 2, [str(gemma(BF16))] * 2, turns)
    weights = [random(width, dtype=BF16) for _ in xs]

    def of_tokens(some):
        cut = [x[:, :, some] for x in xs], weights, *(table[:, :, some] for table in tables)
        return torch.ops.normfuse.qk_rms_norm_rope(*cut, *norms)[:2]

    whole = of_tokens(slice(None))
    for some in (slice(1), slice(700, 812), slice(4095, 4096)):
        assert_same_bits(of_tokens(some), [result[:, :, some] for result in whole])


@pytest.mark.parametrize("widths", [(4096, 1024), (769, 64), (20000, 64)])
def test_whole_projections(widths):
    """The widest do not fit one launch, and go the way of the reference."""
    xs, weights = [random(300, width) for width in widths], [random(width) for width in widths]
    arguments = (xs, weights, [EPS] * 2, [0.0] * 2, [str(llama(BF16))] * 2)
    results, eager = torch.ops.normfuse.qk_rms_norm(*arguments), qk_rms_norm_reference(*arguments)
    for index, (x, weight) in enumerate(zip(xs, weights, strict=True)):
        exact = float64.rms_norm(x, weight, EPS, 0.0)
        float64.assert_as_close_as_eager(results[index], eager[index], exact)


@pytest.mark.parametrize("contiguous", ["", " contiguous"])
@pytest.mark.parametrize("counts", [(32, 32), (40, 8), (48, 4), (3, 1)])
@pytest.mark.parametrize("tokens", [1, 7, 300])
def test_norms_over_all_heads_of_a_token(tokens, counts, contiguous):
    """Packed, as in a projection of q, k and v."""
    packed = random(2, tokens, sum(counts) * 128).split([num * 128 for num in counts], -1)
    xs = [x.unflatten(-1, (-1, 128)).transpose(1, 2) for x in packed]
    weights = [random(num, 1, 128) for num in counts]
    cos, sin = (random(1, 1, tokens, 128, dtype=F32) for _ in range(2))
    numbers = ([EPS] * 2, [1.0] * 2)
    turns = [f"half 128 in=bf16 out=bf16{contiguous}"] * 2
    arguments = (xs, weights, cos, sin, *numbers, [str(gemma(BF16))] * 2, turns)

    results = torch.ops.normfuse.qk_rms_norm_rope(*arguments)

    assert layouts(results) == layouts(qk_rms_norm_rope_fake(*arguments))
    eager = qk_rms_norm_rope_reference(*arguments)
    exact = float64.qk_rms_norm_rope(*arguments)
    for result, other, truth in zip(results[:2], eager, exact, strict=False):
        float64.assert_as_close_as_eager(result, other, truth)


@pytest.mark.parametrize("num_heads", [16, 32, 40])
def test_a_tokens_bits_do_not_depend_on_how_many_joint_norms_there_are(num_heads):
    x = random(1, 4096, num_heads * 128).view(1, 4096, num_heads, 128).transpose(1, 2)
    weight, tables = random(num_heads, 1, 128), [random(1, 1, 4096, 128) for _ in range(2)]
    norm = ([EPS], [1.0], [str(gemma(BF16))], ["half 128 in=bf16 out=bf16"])

    def of_tokens(some):
        cut = [x[:, :, some]], [weight], *(table[:, :, some] for table in tables)
        return torch.ops.normfuse.qk_rms_norm_rope(*cut, *norm)[:1]

    (whole,) = of_tokens(slice(None))
    for some in (slice(1), slice(700, 812), slice(4095, 4096)):
        assert_same_bits(of_tokens(some), [whole[:, :, some]])


BLOCKS = {
    "qwen3": lambda: rotary.Attention(),
    "gemma3": lambda: rotary.NormAfterTranspose(norm=GemmaRMSNorm),
    "gemma4": lambda: rotary.OneByOne(Gemma4WeightlessNorm()),
    "packed, partial": lambda: rotary.Packed(rotary=rotary.partial),
    "interleaved": lambda: rotary.Attention(rotary.cohere),
    "complex": lambda: rotary.Attention(rotary.llama4),
    "olmo2": lambda: JointNorms(),
    "hunyuan": lambda: rotary.NormAfterRotary(),
}


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", BLOCKS)
def test_inside_inductor(name, dynamic):
    block = BLOCKS[name]().bfloat16()
    inputs = (rotary.hidden_states(), *rotary.tables())
    options = normfuse.options(lowering="triton")
    with torch.no_grad():
        ours, eager = (
            torch.compile(block, options=options, dynamic=dynamic)(*inputs),
            block(*inputs),
        )
        exact = copy.deepcopy(block).double()(*(value.double() for value in inputs))
    error = (ours.double() - exact).abs().max().item()
    assert error <= 2 * (eager.double() - exact).abs().max().item()


def test_training_step_through_the_kernel():
    block = rotary.Attention(norm=torch.nn.RMSNorm)
    inputs = [rotary.hidden_states(F32), *rotary.tables(F32)]
    compiled = torch.compile(block, options=normfuse.options(lowering="triton"))

    def gradients(function):
        block.zero_grad()
        function(*inputs).square().sum().backward()
        return [parameter.grad.clone() for parameter in block.parameters()]

    for ours, theirs in zip(gradients(compiled), gradients(block), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
