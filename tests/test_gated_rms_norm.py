"""The rule `gated_rms_norm`: which chains become one op, and for which reasons others do not."""

import logging

import pytest
import torch
import torch.nn.functional as F
from expecttest import TestCase
from torch import nn

from normfuse.explain import explain_with
from normfuse.testing import capture
from tests import gated_blocks as blocks
from tests.blocks import WIDTH, LlamaRMSNorm, activation
from tests.graphs import after_each_pass

BLOCKS = {
    "qwen3_next": blocks.Qwen3NextRMSNormGated,
    "kimi_linear": blocks.KimiLinearRMSNormGated,
    "mamba2": blocks.MambaRMSNormGated,
    "zamba2": blocks.Zamba2RMSNormGated,
    "falcon_h1, norm first": blocks.FalconH1RMSNormGated,
    "falcon_h1, gate first": lambda: blocks.FalconH1RMSNormGated(norm_before_gate=False),
    "falcon_h1, one group": lambda: blocks.FalconH1RMSNormGated(n_groups=1),
}
EPS = 1e-6


def norm(h):
    return h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS)


def assert_is_eager(block, *inputs, grad=False):
    """All sites went into the op, and the rewritten graph has eager's bits and layout."""
    with torch.set_grad_enabled(grad):
        report = explain_with(block, inputs, options={"normfuse.lowering": "op"})
        assert [(site.op, site.reason) for site in report.sites] == [("gated_rms_norm", None)]
        result = capture(block, lowering="op")(*inputs)
        expected = block(*inputs)
    assert torch.equal(result, expected)
    assert (result.dtype, result.stride()) == (expected.dtype, expected.stride())


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
def test_every_block_is_one_op_with_the_bits_of_eager(name, dtype, grad):
    block = BLOCKS[name]().to(dtype)
    assert_is_eager(block, activation(3, 5, dtype=dtype), activation(3, 5, dtype=dtype), grad=grad)


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("lowering", ["op", "inline"])
def test_changing_shapes(name, lowering):
    block = BLOCKS[name]().bfloat16()
    with torch.no_grad():
        captured = capture(block, lowering=lowering)
        plain = capture(block, rules=[])
        for rows in ((3, 5), (2, 7), (1, 1), (4, 2)):
            x, gate = activation(*rows), activation(*rows)
            expected = block(x, gate) if lowering == "op" else plain(x, gate)
            assert torch.equal(captured(x, gate), expected), rows


def silu_method(x):
    return x * x.sigmoid()


@pytest.mark.parametrize(
    "act",
    [F.silu, nn.SiLU(), torch.sigmoid, torch.Tensor.sigmoid, F.sigmoid, silu_method],
    ids=["F.silu", "nn.SiLU", "torch.sigmoid", "Tensor.sigmoid", "F.sigmoid", "x * sigmoid"],
)
def test_every_spelling_of_the_activation(act):
    def gate_last(x, gate):
        return act(gate) * norm(x)

    def gate_first(x, gate):
        return norm(act(gate) * x)

    for block in (gate_last, gate_first):
        torch._dynamo.reset()
        assert_is_eager(block, activation(3, 5), activation(3, 5))


def test_a_gate_that_is_a_slice():
    block = blocks.Zamba2RMSNormGated().bfloat16()

    def mixer(packed):
        return block(packed[..., :WIDTH], packed[..., WIDTH:])

    assert_is_eager(mixer, torch.randn(3, 5, 2 * WIDTH).bfloat16())


def test_a_weight_that_all_groups_share():
    weight = torch.rand(WIDTH // 2).bfloat16()

    def heads(x, gate):
        y = norm(x.view(3, 5, 2, WIDTH // 2)) * weight
        return y.view(3, 5, WIDTH) * torch.sigmoid(gate)

    assert_is_eager(heads, activation(3, 5), activation(3, 5))


def test_the_inverse_root_is_returned_where_it_is_read():
    def block(x, gate):
        rstd = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)
        return x * rstd * torch.sigmoid(gate), rstd

    x, gate = activation(3, dtype=torch.float32), activation(3, dtype=torch.float32)
    with torch.no_grad():
        report = explain_with(block, (x, gate), options={"normfuse.lowering": "op"})
        results = capture(block, lowering="op")(x, gate)
        assert all(map(torch.equal, results, block(x, gate)))
    assert [site.op for site in report.sites] == ["gated_rms_norm"]


def test_left_out_by_an_option():
    block = blocks.MambaRMSNormGated()
    with torch.no_grad():
        report = explain_with(
            block, (activation(3), activation(3)), options={"normfuse.skip": ["gated_rms_norm"]}
        )
    assert [site.op for site in report.sites] == ["rms_norm"]


class Snapshots(TestCase):
    def test_gate_after_the_norm(self):
        block = blocks.Qwen3NextRMSNormGated().bfloat16()
        text = after_each_pass(block, activation(2), activation(2), lowering="op")
        self.assertExpectedInline(
            text,
            """\
before autograd:
    gated_rms_norm_default = normfuse.gated_rms_norm.default(l_hidden_states, l_gate, l_self_weight, 1e-06, 0.0, 1, False, 'silu', 'f32 unit=f32>bf16 weight=bf16 out=bf16', 'gate=f32 factor=f32 product=f32 out=bf16')
    getitem_1 = getitem(gated_rms_norm_default, 0)
    return (getitem_1)
after autograd:
    gated_rms_norm = normfuse.gated_rms_norm.default(arg0_1, arg2_1, arg1_1, 1e-06, 0.0, 1, False, 'silu', 'f32 unit=f32>bf16 weight=bf16 out=bf16', 'gate=f32 factor=f32 product=f32 out=bf16')
    getitem = getitem(gated_rms_norm, 0)
    return (getitem)
lowered:
    the same
""",
        )

    def test_gate_before_the_norm_of_groups(self):
        block = blocks.Zamba2RMSNormGated().bfloat16()
        text = after_each_pass(block, activation(2), activation(2), lowering="op")
        self.assertExpectedInline(
            text,
            """\
before autograd:
    gated_rms_norm_default = normfuse.gated_rms_norm.default(l_hidden_states, l_gate, l_self_weight, 1e-06, 0.0, 2, True, 'silu', 'f32 unit=f32>bf16 weight=bf16 out=bf16', 'gate=f32 factor=f32 product=f32 out=f32')
    getitem_1 = getitem(gated_rms_norm_default, 0)
    return (getitem_1)
after autograd:
    gated_rms_norm = normfuse.gated_rms_norm.default(arg0_1, arg1_1, arg2_1, 1e-06, 0.0, 2, True, 'silu', 'f32 unit=f32>bf16 weight=bf16 out=bf16', 'gate=f32 factor=f32 product=f32 out=f32')
    getitem = getitem(gated_rms_norm, 0)
    return (getitem)
lowered:
    the same
""",
        )

    def test_lowered_inline(self):
        block = blocks.FalconH1RMSNormGated().bfloat16()
        text = after_each_pass(block, activation(1, 2), activation(1, 2), lowering="inline")
        self.assertExpectedInline(
            text.split("lowered:\n")[1],
            """\
    view = aten.view.default(arg1_1, (2, 4))
    view_1 = aten.view.default(arg0_1, (1, 2, 2, 4))
    convert_element_type = prims.convert_element_type.default(view_1, torch.float32)
    pow_1 = aten.pow.Tensor_Scalar(convert_element_type, 2)
    mean = aten.mean.dim(pow_1, (-1), True)
    add = aten.add.Tensor(mean, 1e-06)
    rsqrt = aten.rsqrt.default(add)
    mul = aten.mul.Tensor(convert_element_type, rsqrt)
    mul_1 = aten.mul.Tensor(view, mul)
    view_2 = aten.view.default(mul_1, (1, 2, 8))
    convert_element_type_1 = prims.convert_element_type.default(arg2_1, torch.float32)
    neg = aten.neg.default(convert_element_type_1)
    exp = aten.exp.default(neg)
    add_1 = aten.add.Tensor(exp, 1)
    div = aten.div.Tensor(convert_element_type_1, add_1)
    mul_2 = aten.mul.Tensor(view_2, div)
    convert_element_type_2 = prims.convert_element_type.default(mul_2, torch.bfloat16)
    return (convert_element_type_2)
""",
        )


class TestMisses:
    """The gate stays outside, and the norm is an op of its own."""

    @pytest.fixture
    def declined(self, caplog):
        def sentence(block, *inputs, grad=False):
            caplog.set_level(logging.DEBUG, "normfuse")
            with torch.set_grad_enabled(grad):
                report = explain_with(block, inputs, options={"normfuse.lowering": "op"})
            assert [site.op for site in report.sites] == ["rms_norm"]
            sentences = [
                record.message for record in caplog.records if "no gated" in record.message
            ]
            return sentences[-1].split("no gated_rms_norm: ")[1] if sentences else None

        return sentence

    def test_gated_value_with_another_user(self, declined):
        def block(x, gate):
            x = x * F.silu(gate)
            return norm(x), x

        assert declined(block, activation(3), activation(3)) == (
            "the gated value has another user, which no op returns"
        )

    def test_normalised_value_with_another_user(self, declined):
        def block(x, gate):
            y = norm(x)
            return y * torch.sigmoid(gate), y

        assert declined(block, activation(3), activation(3)) is None

    def test_gate_made_of_the_norm(self, declined):
        """`AXK2GatedRMSNorm`."""
        norm_of, mlp = LlamaRMSNorm(), nn.Linear(WIDTH, WIDTH)

        def block(x):
            y = norm_of(x)
            return y * torch.sigmoid(mlp(y))

        assert declined(block, activation(3, dtype=torch.float32)) is None

    def test_silu_written_out(self, declined):
        def block(x):
            return norm(x * torch.sigmoid(x))

        assert declined(block, activation(3)) is None

    def test_another_activation(self, declined):
        def block(x, gate):
            return norm(x) * torch.tanh(gate)

        assert declined(block, activation(3), activation(3)) is None

    def test_gate_of_another_shape(self, declined):
        def block(x, gate):
            return norm(x) * torch.sigmoid(gate)

        assert declined(block, activation(3), torch.randn(3, 1).bfloat16()) == (
            "the gate of shape (3, 1) does not have the shape of what it multiplies, (3, 8)"
        )

    def test_activation_rounded_twice(self, declined):
        def block(x, gate):
            return norm(x) * torch.sigmoid(gate.double()).float().bfloat16()

        assert declined(block, activation(3), activation(3)) == (
            "the activation of the gate is rounded twice"
        )

    def test_gated_value_rounded_twice(self, declined):
        def block(x, gate):
            return norm((x.double() * torch.sigmoid(gate)).float().bfloat16())

        assert declined(block, activation(3), activation(3)) == ("the gated value is rounded twice")

    def test_x_in_no_shape_of_the_gate(self, declined):
        def block(x, gate):
            return norm(x).view(3, 2 * WIDTH) * torch.sigmoid(gate)

        assert declined(block, activation(3, 2), torch.randn(3, 2 * WIDTH).bfloat16()) == (
            "the gate of shape (3, 16) does not have the shape of the normalised value, (3, 2, 8)"
        )

    def test_norm_wider_than_the_gate(self, declined):
        def block(x, gate):
            return norm((x * torch.sigmoid(gate)).view(2 * WIDTH)).view(2, WIDTH)

        assert declined(block, activation(2), activation(2)) == (
            "the norm runs over 16 elements, and a row of the gate has 8"
        )

    def test_weight_that_spans_neither_row_nor_group(self, declined):
        weight = torch.rand(2 * WIDTH).bfloat16()

        def block(x, gate):
            y = norm(x.view(2 * WIDTH).view(4, 4)).view(2 * WIDTH) * weight
            return y.view(2, WIDTH) * torch.sigmoid(gate)

        assert declined(block, activation(2), activation(2)) == (
            "the weight spans neither a row of 8 elements nor a group of 4"
        )

    def test_result_laid_out_by_the_gate(self, declined):
        def block(x, gate):
            return torch.sigmoid(gate) * norm(x)

        assert declined(block, activation(3, 5).transpose(0, 1), activation(5, 3)) == (
            "eager's result has the strides (24, 8, 1), and the op's would have (8, 40, 1)"
        )

    def test_inverse_root_of_groups_in_another_shape(self, declined):
        def block(x, gate):
            rows = x.view(3, 1, WIDTH)
            rstd = torch.rsqrt(rows.pow(2).mean(-1, keepdim=True) + EPS)
            return (rows * rstd).view(3, WIDTH) * torch.sigmoid(gate), rstd

        assert declined(block, activation(3), activation(3)) == (
            "the inverse root of a group is used in another shape"
        )

    def test_gate_changed_in_place(self, declined):
        def block(x, gate):
            gate = gate * 2
            factor = torch.sigmoid(gate)
            gate.mul_(3)
            return norm(x) * factor, gate

        x = activation(3, dtype=torch.float32).requires_grad_()
        assert declined(block, x, activation(3, dtype=torch.float32), grad=True) == (
            "a value that it reads is changed in place by `mul_` on the way"
        )

    def test_gate_made_of_the_inverse_root(self, declined):
        def block(x):
            rstd = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)
            return x * rstd * torch.sigmoid(x + rstd)

        assert declined(block, activation(3)) == (
            "an operand of the chain is computed after the first use of its result"
        )
