"""Two normalised branches, a norm of their sum and the residual: the rules and their misses."""

import copy
import logging

import pytest
import torch
from expecttest import TestCase

from normfuse.explain import explain_with
from normfuse.testing import capture
from tests import blocks, float64
from tests.blocks import WIDTH, activation
from tests.graphs import after_each_pass, ops_in


class Snapshots(TestCase):
    def test_gemma4_layer_whose_sum_is_scaled_in_place(self):
        block = blocks.Gemma4ExpertsBlock().bfloat16()
        text = after_each_pass(block, *(activation(2) for _ in range(3)), lowering="op")
        self.assertExpectedInline(
            text,
            """\
before autograd:
    dual_rms_norm_add_rms_norm_default = normfuse.dual_rms_norm_add_rms_norm.default(l_hidden_states, l_hidden_states_2, l_residual, post_feedforward_layernorm_1_weight, post_feedforward_layernorm_2_weight, post_feedforward_layernorm_weight, input_layernorm_weight, None, l_self_buffers_layer_scalar, None, None, 1e-06, 0.0, 'f32 pow unit=f32 weight=f32 out=bf16', 1e-06, 0.0, 'f32 pow unit=f32 weight=f32 out=bf16', 1e-06, 0.0, 'f32 pow unit=f32 weight=f32 out=bf16', 1e-06, 0.0, 'f32 pow unit=f32 weight=f32 out=bf16')
    getitem_6 = getitem(dual_rms_norm_add_rms_norm_default, 1)
    getitem_5 = getitem(dual_rms_norm_add_rms_norm_default, 0)
    return (getitem_5, getitem_6)
after autograd:
    dual_rms_norm_add_rms_norm = normfuse.dual_rms_norm_add_rms_norm.default(arg0_1, arg2_1, arg5_1, arg1_1, arg3_1, arg4_1, arg7_1, None, arg6_1, None, None, 1e-06, 0.0, 'f32 pow unit=f32 weight=f32 out=bf16', 1e-06, 0.0, 'f32 pow unit=f32 weight=f32 out=bf16', 1e-06, 0.0, 'f32 pow unit=f32 weight=f32 out=bf16', 1e-06, 0.0, 'f32 pow unit=f32 weight=f32 out=bf16')
    getitem = getitem(dual_rms_norm_add_rms_norm, 0)
    getitem_1 = getitem(dual_rms_norm_add_rms_norm, 1)
    return (getitem, getitem_1)
lowered:
    the same
""",
        )

    def test_a_sum_that_no_norm_follows(self):
        def end(x_1, x_2, residual, weight):
            return (residual + norm(norm(x_1, weight) + norm(x_2, weight), weight)) * 0.7

        text = after_each_pass(end, *operands()[:3], operands()[3], lowering="op")
        self.assertExpectedInline(
            text,
            """\
before autograd:
    dual_rms_norm_add_default = normfuse.dual_rms_norm_add.default(l_x_1, l_x_2, l_residual, l_weight, l_weight, l_weight, None, None, None, 0.7, 1e-06, 0.0, 'f32 unit=f32 weight=bf16 out=bf16', 1e-06, 0.0, 'f32 unit=f32 weight=bf16 out=bf16', 1e-06, 0.0, 'f32 unit=f32 weight=bf16 out=bf16')
    getitem_3 = getitem(dual_rms_norm_add_default, 0)
    return (getitem_3)
after autograd:
    dual_rms_norm_add = normfuse.dual_rms_norm_add.default(arg0_1, arg2_1, arg3_1, arg1_1, arg1_1, arg1_1, None, None, None, 0.7, 1e-06, 0.0, 'f32 unit=f32 weight=bf16 out=bf16', 1e-06, 0.0, 'f32 unit=f32 weight=bf16 out=bf16', 1e-06, 0.0, 'f32 unit=f32 weight=bf16 out=bf16')
    getitem = getitem(dual_rms_norm_add, 0)
    return (getitem)
lowered:
    the same
""",
        )


def norm(x, weight, eps=1e-6):
    """`Olmo2RMSNorm`, with an eps of one's choice."""
    h = x.float()
    return (weight * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps))).to(x.dtype)


def operands(dtype=torch.bfloat16):
    """Two branches, the residual and a weight."""
    return *(activation(2, 3, dtype=dtype) for _ in range(3)), (torch.rand(WIDTH) + 0.5).to(dtype)


def swapped(x, y, residual, w):
    return norm(norm(y, w) + norm(x, w), w) + residual


def scaled_twice(x, y, residual, w):
    return (residual + norm(norm(x, w) + norm(y, w), w) * 0.22) * 0.7


def one_branch_for_both(x, y, residual, w):
    return residual + norm(norm(x, w) + norm(x, w * 2), w)


def norm_follows(x, y, residual, w):
    total = residual + norm(norm(x, w) + norm(y, w), w)
    return norm(total, w), total


def several_norms_follow(x, y, residual, w):
    total = residual + norm(norm(x, w) + norm(y, w), w)
    return norm(total, w), norm(total, w * 2), total


def sum_without_another_reader(x, y, residual, w):
    return norm(residual + norm(norm(x, w) + norm(y, w), w), w)


def other_layouts(x, y, residual, w):
    x, y = x.transpose(0, 1).contiguous().transpose(0, 1), y[:, :1].expand_as(y)
    return residual + norm(norm(x, w) + norm(y, w), w)


DUAL, DUAL_AND_NORM = "dual_rms_norm_add", "dual_rms_norm_add_rms_norm"
HITS = {
    swapped: [DUAL],
    scaled_twice: [DUAL],
    one_branch_for_both: [DUAL],
    norm_follows: [DUAL_AND_NORM],
    several_norms_follow: [DUAL, "rms_norms"],
    sum_without_another_reader: [DUAL_AND_NORM],
    other_layouts: [DUAL],
}


def branch_with_another_reader(x, y, residual, w):
    branch = norm(x, w) + norm(y, w)
    return residual + norm(branch, w), branch


def norm_with_another_reader(x, y, residual, w):
    first = norm(x, w)
    return residual + norm(first + norm(y, w), w), first


def normed_with_another_reader(x, y, residual, w):
    normed = norm(norm(x, w) + norm(y, w), w)
    return residual + normed, normed


def scaled_branch(x, y, residual, w):
    return residual + norm(norm(x, w) * 0.5 + norm(y, w), w)


def scaled_sum_of_branches(x, y, residual, w):
    return residual + norm((norm(x, w) + norm(y, w)) * 0.5, w)


def one_norm_twice(x, y, residual, w):
    first = norm(x, w)
    return residual + norm(first + first, w)


def one_norm_only(x, y, residual, w):
    return residual + norm(x + norm(y, w), w)


def eps_in_a_buffer(x, y, residual, w):
    return residual + norm(norm(x, w, w[:1]) + norm(y, w), w)


def no_residual(x, y, residual, w):
    return norm(norm(x, w) + norm(y, w), w)


def rstd_that_is_read(x, y, residual, w):
    h = x.float()
    rstd = torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
    return residual + norm((w * (h * rstd)).to(x.dtype) + norm(y, w), w), rstd


MISSES = [
    branch_with_another_reader,
    norm_with_another_reader,
    normed_with_another_reader,
    scaled_branch,
    scaled_sum_of_branches,
    one_norm_twice,
    one_norm_only,
    eps_in_a_buffer,
    no_residual,
    rstd_that_is_read,
]


def ops_and_bits(block, *inputs):
    """The ops of the rewritten block, after a check that it has eager's bits and layouts."""
    with torch.no_grad():
        report = explain_with(block, inputs, options={"normfuse.lowering": "op"})
        results, eager = capture(block, lowering="op")(*inputs), block(*inputs)
    for ours, theirs in zip(flat(results), flat(eager), strict=True):
        assert torch.equal(ours, theirs)
        assert ours.stride() == theirs.stride()
    return ops_in(report.after)


def flat(value):
    return value if isinstance(value, tuple) else (value,)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("block", HITS, ids=lambda block: block.__name__)
def test_hits(block, dtype):
    assert ops_and_bits(block, *operands(dtype)) == HITS[block]


@pytest.mark.parametrize("block", MISSES, ids=lambda block: block.__name__)
def test_misses(block):
    assert not {DUAL, DUAL_AND_NORM} & set(ops_and_bits(block, *operands()))


def declined(block, rule, caplog):
    """The sentence with which the composition was declined."""
    with caplog.at_level(logging.DEBUG, "normfuse"):
        ops_and_bits(block, *operands())
    (sentence,) = {text for text in caplog.messages if f"no {rule}: " in text}
    return sentence.split(f"no {rule}: ")[1]


def test_a_write_between_the_norms(caplog):
    def chain(x, y, residual, w):
        h = x * 2
        first = norm(h, w)
        h.add_(1)
        return residual + norm(first + norm(y, w), w), h

    assert declined(chain, DUAL, caplog) == (
        "a value that it reads is changed in place by `add_` on the way"
    )


def test_a_weight_that_is_made_of_the_sum(caplog):
    def chain(x, y, residual, w):
        total = residual + norm(norm(x, w) + norm(y, w), w)
        return norm(total, total.sum((0, 1)))

    assert declined(chain, DUAL_AND_NORM, caplog) == (
        "an operand of the chain is computed after the first use of its result"
    )


def test_left_out_by_an_option():
    inputs = operands()
    with torch.no_grad():
        report = explain_with(norm_follows, inputs, options={"normfuse.skip": [DUAL]})
    assert not {DUAL, DUAL_AND_NORM} & {site.op for site in report.sites}


def test_the_report_names_the_op_at_every_site():
    block = blocks.Gemma4ExpertsBlock().bfloat16()
    with torch.no_grad():
        report = explain_with(block, [activation(2) for _ in range(3)])
    assert [(site.module, site.op) for site in report.sites] == [
        ("post_feedforward_layernorm_1", DUAL_AND_NORM),
        ("post_feedforward_layernorm_2", DUAL_AND_NORM),
        ("post_feedforward_layernorm", DUAL_AND_NORM),
        ("input_layernorm", DUAL_AND_NORM),
    ]


@pytest.mark.parametrize("dynamic", [True, None])
def test_changing_shapes(dynamic):
    block, options = blocks.Gemma4ExpertsBlock().bfloat16(), {"normfuse.lowering": "op"}
    model = torch.compile(block, backend="normfuse", options=options, dynamic=dynamic)
    with torch.no_grad():
        for shape in ((2, 3), (4, 5), (1, 7)):
            inputs = [activation(*shape) for _ in range(3)]
            for ours, eager in zip(model(*inputs), block(*inputs), strict=True):
                assert torch.equal(ours, eager)


def test_training_has_the_gradients_of_eager():
    block = blocks.Gemma4ExpertsBlock().bfloat16()
    inputs = [activation(32).requires_grad_() for _ in range(3)]
    upstream = [activation(32) for _ in range(2)]

    def gradients(function, block, inputs, upstream):
        parameters = [*inputs, *block.parameters()]
        return torch.autograd.grad(function(*inputs), parameters, upstream)

    options = {"normfuse.lowering": "op"}
    model = torch.compile(block, backend="normfuse", options=options)
    ours = gradients(model, block, inputs, upstream)
    eager = gradients(block, block, inputs, upstream)
    wide = copy.deepcopy(block).double()
    doubles = [tensor.detach().double().requires_grad_() for tensor in inputs]
    exact = gradients(exact_experts(wide), wide, doubles, [one.double() for one in upstream])
    for one, expected, reference in zip(ours, eager, exact, strict=True):
        float64.assert_as_close_as_eager(one, expected, reference)


def exact_experts(block):
    """`Gemma4ExpertsBlock` in float64; its own norms pass through float32."""

    def normed(x, layer):
        return float64.rms_norm(x, layer.weight, layer.eps, 0.0)

    def forward(x_1, x_2, residual):
        branch = normed(x_1, block.post_feedforward_layernorm_1)
        branch = branch + normed(x_2, block.post_feedforward_layernorm_2)
        total = residual + normed(branch, block.post_feedforward_layernorm)
        total = total * block.layer_scalar
        return normed(total, block.input_layernorm), total

    return forward
