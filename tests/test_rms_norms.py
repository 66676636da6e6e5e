"""Several norms of one value: the rule, its misses, the op and its gradients."""

import logging

import pytest
import torch
from expecttest import TestCase
from torch.autograd import gradcheck, gradgradcheck
from torch.library import opcheck

import normfuse
from normfuse.explain import explain_with
from normfuse.ops import RMS_NORMS, RoundingPlan
from normfuse.testing import capture
from tests import blocks, float64
from tests.blocks import WIDTH, activation
from tests.graphs import after_each_pass, ops_in

LLAMA = "f32 unit=f32>bf16 weight=bf16 out=bf16"
WEIGHTLESS = "f32 unit=f32>bf16 out=bf16"


class Snapshots(TestCase):
    def test_gemma4_residual_that_three_norms_read(self):
        block = blocks.Gemma4ExpertNorms().bfloat16()
        text = after_each_pass(block, activation(2, 3), activation(2, 3), lowering="op")
        self.assertExpectedInline(
            text,
            """\
before autograd:
    rms_norm_add_default = normfuse.rms_norm_add.default(l_hidden_states, l_residual, post_attention_layernorm_weight, None, None, None, None, 1e-06, 0.0, 'f32 pow unit=f32 weight=f32 out=bf16')
    getitem_4 = getitem(rms_norm_add_default, 0)
    rms_norms_default = normfuse.rms_norms.default(getitem_4, (pre_feedforward_layernorm_weight, l_self_scale, pre_feedforward_layernorm_2_weight), 1e-06, (0.0, 0.0, 0.0), (1.0, 0.3535533905932738, 1.0), ('f32 pow unit=f32 weight=f32 out=bf16', 'f32 pow unit=f32>bf16 weight=bf16 out=bf16', 'f32 pow unit=f32 weight=f32 out=bf16'))
    getitem_7 = getitem(rms_norms_default, 2)
    getitem_6 = getitem(rms_norms_default, 1)
    getitem_5 = getitem(rms_norms_default, 0)
    hidden_states_flat_1 = Tensor.reshape(getitem_6, -1, 8)
    hidden_states_flat_2 = Tensor.reshape(getitem_7, -1, 8)
    return (getitem_5, hidden_states_flat_1, hidden_states_flat_2, getitem_4)
after autograd:
    rms_norm_add = normfuse.rms_norm_add.default(arg0_1, arg2_1, arg1_1, None, None, None, None, 1e-06, 0.0, 'f32 pow unit=f32 weight=f32 out=bf16')
    getitem = getitem(rms_norm_add, 0)
    rms_norms = normfuse.rms_norms.default(getitem, (arg3_1, arg4_1, arg5_1), 1e-06, (0.0, 0.0, 0.0), (1.0, 0.3535533905932738, 1.0), ('f32 pow unit=f32 weight=f32 out=bf16', 'f32 pow unit=f32>bf16 weight=bf16 out=bf16', 'f32 pow unit=f32 weight=f32 out=bf16'))
    getitem_2 = getitem(rms_norms, 0)
    getitem_3 = getitem(rms_norms, 1)
    getitem_4 = getitem(rms_norms, 2)
    view = aten.view.default(getitem_3, (-1, 8))
    view_1 = aten.view.default(getitem_4, (-1, 8))
    return (getitem_2, view, view_1, getitem)
lowered:
    the same
""",
        )

    def test_a_plain_sum_that_two_norms_read(self):
        block = blocks.SumOfTwoNorms().bfloat16()
        text = after_each_pass(block, activation(2), activation(2), lowering="op")
        self.assertExpectedInline(
            text,
            """\
before autograd:
    hidden_states = add(l_residual, l_hidden_states)
    rms_norms_default = normfuse.rms_norms.default(hidden_states, (attention_norm_weight, mlp_norm_weight), 1e-06, (0.0, 0.0), (1.0, 1.0), ('f32 unit=f32>bf16 weight=bf16 out=bf16', 'f32 unit=f32>bf16 weight=bf16 out=bf16'))
    getitem_3 = getitem(rms_norms_default, 1)
    getitem_2 = getitem(rms_norms_default, 0)
    return (getitem_2, getitem_3, hidden_states)
after autograd:
    add = aten.add.Tensor(arg0_1, arg1_1)
    rms_norms = normfuse.rms_norms.default(add, (arg2_1, arg3_1), 1e-06, (0.0, 0.0), (1.0, 1.0), ('f32 unit=f32>bf16 weight=bf16 out=bf16', 'f32 unit=f32>bf16 weight=bf16 out=bf16'))
    getitem = getitem(rms_norms, 0)
    getitem_1 = getitem(rms_norms, 1)
    return (getitem, getitem_1, add)
lowered:
    the same
""",
        )


def llama(x, weight=None, eps=1e-6, compute=torch.float32):
    """`LlamaRMSNorm`, with an eps and a type of the statistic of one's choice."""
    h = x.to(compute)
    h = (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)
    return h if weight is None else weight * h


def pair(x, v, w):
    return llama(x, v), llama(x, w)


def five(x, v, w):
    return llama(x, v), llama(x, w), llama(x), llama(x, w), llama(x, v)


def behind_views(x, v, w):
    return llama(x.flatten(0, 1), v), llama(x[None].contiguous(), w) * 0.5


def one_norm_is_added(x, v, w):
    return x + llama(x, v), llama(x, w), llama(x)


def scaled_results_of_which_one_has_two_readers(x, v, w):
    first, second = llama(x, v), llama(x, w)
    return first * 0.3, second * 0.3, second


def result_changes_in_place(x, v, w):
    first = llama(x, v)
    first.mul_(2)
    return first, llama(x, w)


HITS = {
    pair: ["rms_norms"],
    five: ["rms_norms", "rms_norm"],
    behind_views: ["rms_norms"],
    one_norm_is_added: ["rms_norm_add", "rms_norms"],
    scaled_results_of_which_one_has_two_readers: ["rms_norms"],
    result_changes_in_place: ["rms_norms"],
}


def another_eps(x, v, w):
    return llama(x, v), llama(x, w, eps=1e-5)


def another_statistic(x, v, w):
    return llama(x, v), llama(x, w, compute=torch.float64)


def another_value(x, v, w):
    return llama(x, v), llama(x * 1, w)


def eps_in_a_buffer(x, v, w):
    eps = v[:1].abs()
    return llama(x, v, eps), llama(x, w, eps)


def other_rows(x, v, w):
    return llama(x, v), llama(x.view(x.shape[0], -1))


def views_of_rows_that_lie_apart(x, v, w):
    h = x.transpose(0, 1)
    return llama(h, v), llama(h.reshape(-1, WIDTH), w)


def rstd_that_is_read(x, v, w):
    h = x.float()
    rstd = torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
    return v * (h * rstd).to(x.dtype), rstd, llama(x, w)


MISSES = [
    another_eps,
    another_statistic,
    another_value,
    eps_in_a_buffer,
    other_rows,
    views_of_rows_that_lie_apart,
    rstd_that_is_read,
]
SIDE_BY_SIDE = (another_eps, another_statistic, rstd_that_is_read)


def operands(dtype=torch.bfloat16):
    return activation(2, 3, dtype=dtype), *(torch.rand(WIDTH).to(dtype) for _ in range(2))


def ops_and_bits(block, *inputs):
    """The ops of the rewritten block, after a check that it has eager's bits and layouts."""
    with torch.no_grad():
        report = explain_with(block, inputs, options={"normfuse.lowering": "op"})
        results = zip(capture(block, lowering="op")(*inputs), block(*inputs), strict=True)
        for ours, eager in results:
            assert torch.equal(ours, eager)
            assert ours.stride() == eager.stride()
    return ops_in(report.after)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("block", HITS, ids=lambda block: block.__name__)
def test_hits(block, dtype):
    assert ops_and_bits(block, *operands(dtype)) == HITS[block]


@pytest.mark.parametrize("block", MISSES, ids=lambda block: block.__name__)
def test_misses(block):
    """Those that read the same value still share a launch, with a statistic each."""
    expected = ["qk_rms_norm"] if block in SIDE_BY_SIDE else ["rms_norm"] * 2
    assert ops_and_bits(block, *operands()) == expected


def test_a_strided_value_without_views():
    x, v, w = operands()
    x = torch.cat([x, x], -1)[..., :WIDTH].transpose(0, 1)
    assert ops_and_bits(pair, x, v, w) == ["rms_norms"]


def declined(block, caplog):
    """The sentence with which the composition was declined."""
    with caplog.at_level(logging.DEBUG, "normfuse"):
        ops_and_bits(block, *operands())
    (sentence,) = {text for text in caplog.messages if "no rms_norms" in text}
    return sentence.split("no rms_norms: ")[1]


def test_a_weight_that_comes_after_the_first_result(caplog):
    def chain(x, v, w):
        first = llama(x, v)
        return first, llama(x, first.sum((0, 1)))

    assert declined(chain, caplog) == (
        "an operand of the chain is computed after the first use of its result"
    )


def test_a_write_between_the_norms(caplog):
    def chain(x, v, w):
        h = x * 2
        first = llama(h, v)
        h.add_(1)
        return first, llama(h, w)

    assert declined(chain, caplog) == (
        "a value that it reads is changed in place by `add_` on the way"
    )


def test_left_out_by_an_option():
    with torch.no_grad():
        report = explain_with(pair, operands(), options={"normfuse.skip": ["rms_norms"]})
    assert [site.op for site in report.sites] == ["qk_rms_norm"] * 2


def test_the_report_names_the_op_at_every_site():
    block = blocks.Gemma4ExpertNorms().bfloat16()
    with torch.no_grad():
        report = explain_with(block, (activation(2, 3), activation(2, 3)))
    assert [(site.module, site.op) for site in report.sites] == [
        ("post_attention_layernorm", "rms_norm_add"),
        ("pre_feedforward_layernorm", "rms_norms"),
        ("", "rms_norms"),  # its last step, the scale, is the layer's own
        ("pre_feedforward_layernorm_2", "rms_norms"),
    ]


@pytest.mark.parametrize("dynamic", [True, None])
def test_changing_shapes(dynamic):
    block = blocks.Gemma4ExpertNorms().bfloat16()
    model = torch.compile(
        block, backend="normfuse", options={"normfuse.lowering": "op"}, dynamic=dynamic
    )
    with torch.no_grad():
        for shape in ((2, 3), (4, 5), (1, 7)):
            x, residual = activation(*shape), activation(*shape)
            for ours, eager in zip(model(x, residual), block(x, residual), strict=True):
                assert torch.equal(ours, eager)


CASES = {
    "weights": ((2, 3, WIDTH), [LLAMA, LLAMA], 2),
    "one weightless": ((4, WIDTH), [WEIGHTLESS, LLAMA, LLAMA], 2),
    "all weightless": ((4, WIDTH), [WEIGHTLESS, WEIGHTLESS], 0),
    "a vector": ((WIDTH,), [LLAMA, WEIGHTLESS], 1),
    "no rows": ((0, WIDTH), [LLAMA, WEIGHTLESS], 1),
}


@pytest.mark.parametrize(("shape", "plans", "num_weights"), CASES.values(), ids=CASES)
def test_opcheck(shape, plans, num_weights):
    x = torch.randn(shape).bfloat16().requires_grad_()
    weights = [torch.randn(WIDTH).bfloat16().requires_grad_() for _ in range(num_weights)]
    offsets, scales = [1.0] * len(plans), [0.5] + [1.0] * (len(plans) - 1)
    checks = opcheck(RMS_NORMS, (x, weights, 1e-6, offsets, scales, plans))
    assert set(checks.values()) == {"SUCCESS"}


def test_gradients():
    weighted, weightless = "f64 unit=f64 weight=f64 out=f64", "f64 unit=f64 out=f64"
    plans = [weighted, weightless, weighted]
    x, v, w = (
        torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((3, 5), 5, 5)
    )

    def every_result(x, v, w):
        return tuple(RMS_NORMS(x, [v, w], 1e-5, [1.0, 0.0, 0.0], [1.0, 0.5, 0.3], plans))

    assert gradcheck(every_result, (x, v, w))
    assert gradcheck(lambda *inputs: every_result(*inputs)[1], (x, v, w))
    assert gradcheck(lambda *inputs: sum(every_result(*inputs)[:-1]), (x, v, w))
    assert gradgradcheck(lambda *inputs: sum(every_result(*inputs)[:2]), (x, v, w))


def test_gradients_of_l2_norms():
    plans = [RoundingPlan.once(torch.float64, torch.float64).with_mean("sum")] * 2
    x, v, w = (
        torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((3, 5), 5, 5)
    )

    assert gradcheck(lambda x, *weights: normfuse.rms_norms(x, weights, plans=plans), (x, v, w))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_in_eager_against_float64(dtype):
    x, v, w = (torch.randn(shape).to(dtype) for shape in ((7, 96), 96, 96))

    ys = normfuse.rms_norms(x, [v, None, w], offsets=[1.0, 0.0, 0.0], scales=[1.0, 0.3, 1.0])

    for y, weight, offset, scale in zip(ys, (v, None, w), (1.0, 0, 0), (1, 0.3, 1), strict=True):
        eager = normfuse.rms_norm(x, weight, offset=offset) * scale
        exact = float64.rms_norm(x, weight, 1e-6, offset) * scale
        float64.assert_as_close_as_eager(y, eager, exact)


def test_refuses_other_numbers_of_norms():
    with pytest.raises(ValueError, match="weights must be those of 2 to 4 norms, got 1"):
        normfuse.rms_norms(torch.ones(2, 4), [None])


def test_refuses_a_list_of_another_length():
    with pytest.raises(ValueError, match="scales must have one entry for each of the 2 weights"):
        normfuse.rms_norms(torch.ones(2, 4), [None, None], scales=[1.0])


def test_refuses_plans_of_other_statistics():
    plan = RoundingPlan.once(torch.float32, None)
    plans = [plan, plan.with_mean("sum_divided")]
    with pytest.raises(ValueError, match=r"plans\[1\] must have the statistic of plans\[0\]"):
        normfuse.rms_norms(torch.ones(2, 4), [None, None], plans=plans)
