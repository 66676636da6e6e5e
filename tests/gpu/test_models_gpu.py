"""Whole models on a GPU: the Triton route inside Inductor, with and without CUDA graphs."""

import copy

import pytest
import torch

import normfuse
from normfuse.explain import explain_with
from tests import blocks

pytestmark = pytest.mark.gpu

WIDTH = 2816


def gemma3(dtype, layers=6):
    """Gemma 3 4B's widths, few layers, a small vocabulary, random weights."""
    transformers = pytest.importorskip("transformers")
    config = transformers.Gemma3TextConfig(
        vocab_size=1024,
        hidden_size=2560,
        intermediate_size=10240,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=256,
        sliding_window=1024,
    )
    torch.manual_seed(0)
    model = transformers.Gemma3ForCausalLM(config).cuda().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.to(dtype)


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def exact(block, *inputs):
    """The block in float64."""
    with torch.no_grad():
        return copy.deepcopy(block).double()(*(x.double() for x in inputs))


def error(value, reference):
    return (value.double() - reference.double()).abs().max().item()


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_gemma3_stays_within_twice_the_error_of_eager(mode):
    ids = torch.randint(3, 1000, (1, 512), device="cuda")
    reference = logits(gemma3(torch.float32), ids)
    model = gemma3(torch.bfloat16)
    eager = logits(model, ids)
    options = normfuse.options(mode=mode, lowering="triton")
    compiled = torch.compile(model, options=options, dynamic=False)
    for _ in range(3):  # warm-up, recording, replay
        result = logits(compiled, ids).clone()
    assert error(result, reference) <= 2 * error(eager, reference)


def test_gemma3_leaves_no_op_and_no_norm_to_inductor():
    ids = torch.randint(3, 1000, (1, 64), device="cuda")
    model = gemma3(torch.bfloat16, layers=2)
    with torch.no_grad():
        report = explain_with(
            model,
            (),
            {"input_ids": ids, "use_cache": False},
            options={"normfuse.lowering": "triton"},
        )
    assert report.coverage == 1.0
    assert {site.lowering for site in report.sites} == {"triton"}
    assert "normfuse" not in report.after


class PackedProjection(torch.nn.Module):
    """Norms of slices of a value that Inductor computes itself, in a layout of its choice."""

    def __init__(self):
        super().__init__()
        self.norm = blocks.LlamaRMSNorm(WIDTH)

    def forward(self, x):
        packed = torch.relu(x) * 2
        return self.norm(packed[..., :WIDTH]) + 1, self.norm(packed[..., WIDTH:]) * 3


class Heads(torch.nn.Module):
    """Per-head norms after a transpose, as in Gemma 3's attention."""

    def __init__(self):
        super().__init__()
        self.norm = blocks.GemmaRMSNorm(256)

    def forward(self, x):
        heads = torch.relu(x).view(2, 64, -1, 256).transpose(1, 2)
        return self.norm(heads) * 2


@pytest.mark.parametrize(
    ("block", "shape"), [(PackedProjection, (96, 2 * WIDTH)), (Heads, (2, 64, 2048))]
)
def test_strided_inputs_that_inductor_lays_out(block, shape):
    torch.manual_seed(0)
    block = block().cuda().bfloat16()
    x = torch.randn(*shape, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        ours = as_tuple(torch.compile(block, options=normfuse.options(lowering="triton"))(x))
        eager = as_tuple(block(x))
    for mine, theirs, reference in zip(ours, eager, as_tuple(exact(block, x)), strict=True):
        assert error(mine, reference) <= 2 * error(theirs, reference)


def as_tuple(value):
    return value if isinstance(value, tuple) else (value,)


def test_replayed_cuda_graphs_see_new_weights():
    torch.manual_seed(0)
    block = blocks.GemmaBlock().cuda().bfloat16()
    x, residual = (torch.randn(4, blocks.WIDTH, device="cuda").bfloat16() for _ in range(2))
    options = normfuse.options(mode="reduce-overhead", lowering="triton")
    compiled = torch.compile(block, options=options)
    with torch.no_grad():
        for _ in range(4):
            before = compiled(x, residual).clone()
        for parameter in block.parameters():
            parameter.data.copy_(torch.randn_like(parameter))
        after, eager = compiled(x, residual).clone(), block(x, residual)
    reference = exact(block, x, residual)
    assert not torch.equal(before, after)
    assert error(after, reference) <= 2 * error(eager, reference)


def test_dynamic_rows_compile_once():
    torch.manual_seed(0)
    block = blocks.GemmaBlock().cuda().bfloat16()
    compiled = torch.compile(block, options=normfuse.options(lowering="triton"), dynamic=True)
    for rows in (5, 3, 17, 64):
        x, residual = (torch.randn(rows, blocks.WIDTH, device="cuda").bfloat16() for _ in range(2))
        with (
            torch.no_grad(),
            torch.compiler.set_stance("default" if rows == 5 else "fail_on_recompile"),
        ):
            ours, eager = compiled(x, residual), block(x, residual)
        reference = exact(block, x, residual)
        assert error(ours, reference) <= 2 * error(eager, reference)


def test_training_step_through_the_kernels():
    torch.manual_seed(0)
    block = blocks.GemmaBlock().cuda()
    x, residual = (torch.randn(16, blocks.WIDTH, device="cuda") for _ in range(2))
    compiled = torch.compile(block, options=normfuse.options(lowering="triton"))

    def gradients(function, *inputs):
        block.zero_grad()
        function(*inputs).square().sum().backward()
        return [parameter.grad.clone() for parameter in block.parameters()]

    ours, eager = gradients(compiled, x, residual), gradients(block, x, residual)
    references = gradients(block.double(), x.double(), residual.double())
    for mine, theirs, reference in zip(ours, eager, references, strict=True):
        scale = reference.abs().max().item()
        assert error(mine, reference) <= 2 * error(theirs, reference) + 4 * 2**-24 * scale
