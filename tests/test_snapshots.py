"""The whole graph after each pass. `EXPECTTEST_ACCEPT=1 pytest tests/test_snapshots.py` rewrites them."""

from expecttest import TestCase

from tests import blocks
from tests.blocks import activation
from tests.graphs import after_each_pass


class Snapshots(TestCase):
    def setUp(self):
        super().setUp()
        self.x, self.residual = activation(2), activation(2)

    def test_llama_block(self):
        block = blocks.LlamaBlock().bfloat16()
        text = after_each_pass(block, self.x, self.residual, lowering="op")
        self.assertExpectedInline(
            text,
            """\
before autograd:
    add_rms_norm_default = normfuse.add_rms_norm.default(l_hidden_states, l_residual, norm_weight, None, None, None, None, 1e-06, 0.0, 'f32 unit=f32>bf16 weight=bf16 out=bf16')
    getitem_2 = getitem(add_rms_norm_default, 1)
    getitem_1 = getitem(add_rms_norm_default, 0)
    hidden_states_4 = linear(getitem_1, branch_weight, None)
    add_2 = add(getitem_2, hidden_states_4)
    return (add_2)
after autograd:
    add_rms_norm = normfuse.add_rms_norm.default(arg1_1, arg0_1, arg2_1, None, None, None, None, 1e-06, 0.0, 'f32 unit=f32>bf16 weight=bf16 out=bf16')
    getitem = getitem(add_rms_norm, 0)
    getitem_1 = getitem(add_rms_norm, 1)
    permute = aten.permute.default(arg3_1, (1, 0))
    mm = aten.mm.default(getitem, permute)
    add = aten.add.Tensor(getitem_1, mm)
    return (add)
lowered:
    add_rms_norm = normfuse.add_rms_norm.default(arg1_1, arg0_1, arg2_1, None, None, None, None, 1e-06, 0.0, 'f32 unit=f32>bf16 weight=bf16 out=bf16')
    getitem = getitem(add_rms_norm, 0)
    getitem_1 = getitem(add_rms_norm, 1)
    permute = aten.permute.default(arg3_1, (1, 0))
    addmm_default = aten.addmm.default(getitem_1, getitem, permute)
    return (addmm_default)
""",
        )

    def test_llama_block_lowered_inline(self):
        block = blocks.LlamaBlock().bfloat16()
        text = after_each_pass(block, self.x, self.residual, lowering="inline")
        self.assertExpectedInline(
            text,
            """\
before autograd:
    add_rms_norm_default = normfuse.add_rms_norm.default(l_hidden_states, l_residual, norm_weight, None, None, None, None, 1e-06, 0.0, 'f32 unit=f32>bf16 weight=bf16 out=bf16')
    getitem_2 = getitem(add_rms_norm_default, 1)
    getitem_1 = getitem(add_rms_norm_default, 0)
    hidden_states_4 = linear(getitem_1, branch_weight, None)
    add_2 = add(getitem_2, hidden_states_4)
    return (add_2)
after autograd:
    add_rms_norm = normfuse.add_rms_norm.default(arg1_1, arg0_1, arg2_1, None, None, None, None, 1e-06, 0.0, 'f32 unit=f32>bf16 weight=bf16 out=bf16')
    getitem = getitem(add_rms_norm, 0)
    getitem_1 = getitem(add_rms_norm, 1)
    permute = aten.permute.default(arg3_1, (1, 0))
    mm = aten.mm.default(getitem, permute)
    add = aten.add.Tensor(getitem_1, mm)
    return (add)
lowered:
    add_1 = aten.add.Tensor(arg0_1, arg1_1)
    convert_element_type_2 = prims.convert_element_type.default(add_1, torch.float32)
    pow_1 = aten.pow.Tensor_Scalar(convert_element_type_2, 2)
    mean = aten.mean.dim(pow_1, (-1), True)
    add_2 = aten.add.Tensor(mean, 1e-06)
    rsqrt = aten.rsqrt.default(add_2)
    mul = aten.mul.Tensor(convert_element_type_2, rsqrt)
    convert_element_type_3 = prims.convert_element_type.default(mul, torch.bfloat16)
    mul_1 = aten.mul.Tensor(arg2_1, convert_element_type_3)
    permute = aten.permute.default(arg3_1, (1, 0))
    addmm_default = aten.addmm.default(add_1, mul_1, permute)
    return (addmm_default)
""",
        )

    def test_gemma_sandwich_block(self):
        block = blocks.GemmaBlock().bfloat16()
        text = after_each_pass(block, self.x, self.residual, lowering="op")
        self.assertExpectedInline(
            text,
            """\
before autograd:
    rms_norm_add_rms_norm_default = normfuse.rms_norm_add_rms_norm.default(l_hidden_states, l_residual, post_attention_layernorm_weight, pre_feedforward_layernorm_weight, None, None, None, None, 1e-06, 1.0, 'f32 unit=f32 weight=f32 out=bf16', 1e-06, 1.0, 'f32 unit=f32 weight=f32 out=bf16')
    getitem_6 = getitem(rms_norm_add_rms_norm_default, 1)
    getitem_5 = getitem(rms_norm_add_rms_norm_default, 0)
    hidden_states_3 = linear(getitem_5, mlp_weight, None)
    rms_norm_add_default_1 = normfuse.rms_norm_add.default(hidden_states_3, getitem_6, post_feedforward_layernorm_weight, None, None, None, None, 1e-06, 1.0, 'f32 unit=f32 weight=f32 out=bf16')
    getitem_4 = getitem(rms_norm_add_default_1, 0)
    return (getitem_4)
after autograd:
    rms_norm_add_rms_norm = normfuse.rms_norm_add_rms_norm.default(arg0_1, arg2_1, arg1_1, arg3_1, None, None, None, None, 1e-06, 1.0, 'f32 unit=f32 weight=f32 out=bf16', 1e-06, 1.0, 'f32 unit=f32 weight=f32 out=bf16')
    getitem = getitem(rms_norm_add_rms_norm, 0)
    getitem_1 = getitem(rms_norm_add_rms_norm, 1)
    permute = aten.permute.default(arg4_1, (1, 0))
    mm = aten.mm.default(getitem, permute)
    rms_norm_add = normfuse.rms_norm_add.default(mm, getitem_1, arg5_1, None, None, None, None, 1e-06, 1.0, 'f32 unit=f32 weight=f32 out=bf16')
    getitem_4 = getitem(rms_norm_add, 0)
    return (getitem_4)
lowered:
    the same
""",
        )

    def test_gemma4_block_scales_the_sum_in_place(self):
        block = blocks.Gemma4Block().bfloat16()
        text = after_each_pass(block, self.x, self.residual, lowering="op")
        self.assertExpectedInline(
            text,
            """\
before autograd:
    rms_norm_add_rms_norm_default = normfuse.rms_norm_add_rms_norm.default(l_hidden_states, l_residual, post_feedforward_layernorm_weight, input_layernorm_weight, None, l_self_buffers_layer_scalar, None, None, 1e-06, 1.0, 'f32 unit=f32 weight=f32 out=bf16', 1e-06, 1.0, 'f32 unit=f32 weight=f32 out=bf16')
    getitem_4 = getitem(rms_norm_add_rms_norm_default, 1)
    getitem_3 = getitem(rms_norm_add_rms_norm_default, 0)
    return (getitem_3, getitem_4)
after autograd:
    rms_norm_add_rms_norm = normfuse.rms_norm_add_rms_norm.default(arg0_1, arg2_1, arg1_1, arg4_1, None, arg3_1, None, None, 1e-06, 1.0, 'f32 unit=f32 weight=f32 out=bf16', 1e-06, 1.0, 'f32 unit=f32 weight=f32 out=bf16')
    getitem = getitem(rms_norm_add_rms_norm, 0)
    getitem_1 = getitem(rms_norm_add_rms_norm, 1)
    return (getitem, getitem_1)
lowered:
    the same
""",
        )

    def test_granite_block(self):
        block = blocks.GraniteBlock().bfloat16()
        text = after_each_pass(block, self.x, self.residual, lowering="op")
        self.assertExpectedInline(
            text,
            """\
before autograd:
    add_rms_norm_default = normfuse.add_rms_norm.default(l_hidden_states, l_residual, norm_weight, None, None, 0.22, None, 1e-06, 0.0, 'f32 unit=f32>bf16 weight=bf16 out=bf16')
    getitem_2 = getitem(add_rms_norm_default, 1)
    getitem_1 = getitem(add_rms_norm_default, 0)
    return (getitem_1, getitem_2)
after autograd:
    add_rms_norm = normfuse.add_rms_norm.default(arg0_1, arg1_1, arg2_1, None, None, 0.22, None, 1e-06, 0.0, 'f32 unit=f32>bf16 weight=bf16 out=bf16')
    getitem = getitem(add_rms_norm, 0)
    getitem_1 = getitem(add_rms_norm, 1)
    return (getitem, getitem_1)
lowered:
    the same
""",
        )

    def test_olmo_post_norm_block(self):
        block = blocks.OlmoBlock().bfloat16()
        text = after_each_pass(block, self.x, self.residual, lowering="op")
        self.assertExpectedInline(
            text,
            """\
before autograd:
    rms_norm_add_default = normfuse.rms_norm_add.default(l_hidden_states, l_residual, post_attention_layernorm_weight, None, None, None, None, 1e-06, 0.0, 'f32 unit=f32 weight=bf16 out=bf16')
    getitem_1 = getitem(rms_norm_add_default, 0)
    linear = linear(getitem_1, mlp_weight, None)
    return (linear)
after autograd:
    rms_norm_add = normfuse.rms_norm_add.default(arg0_1, arg2_1, arg1_1, None, None, None, None, 1e-06, 0.0, 'f32 unit=f32 weight=bf16 out=bf16')
    getitem = getitem(rms_norm_add, 0)
    permute = aten.permute.default(arg3_1, (1, 0))
    mm = aten.mm.default(getitem, permute)
    return (mm)
lowered:
    the same
""",
        )

    def test_norm_scaled_before_the_add(self):
        block = blocks.HyperClovaBlock().bfloat16()
        text = after_each_pass(block, self.x, self.residual, lowering="op")
        self.assertExpectedInline(
            text,
            """\
before autograd:
    rms_norm_add_default = normfuse.rms_norm_add.default(l_hidden_states, l_residual, norm_weight, None, None, 0.5, None, 1e-06, 0.0, 'f32 unit=f32>bf16 weight=bf16 out=bf16')
    getitem_1 = getitem(rms_norm_add_default, 0)
    return (getitem_1)
after autograd:
    rms_norm_add = normfuse.rms_norm_add.default(arg0_1, arg2_1, arg1_1, None, None, 0.5, None, 1e-06, 0.0, 'f32 unit=f32>bf16 weight=bf16 out=bf16')
    getitem = getitem(rms_norm_add, 0)
    return (getitem)
lowered:
    the same
""",
        )

    def test_weightless_norm(self):
        text = after_each_pass(blocks.Gemma4WeightlessNorm(), self.x, lowering="op")
        self.assertExpectedInline(
            text,
            """\
before autograd:
    rms_norm_default = normfuse.rms_norm.default(l_hidden_states, None, None, 1e-06, 0.0, 'f32 pow unit=f32>bf16 out=bf16')
    getitem = getitem(rms_norm_default, 0)
    return (getitem)
after autograd:
    rms_norm = normfuse.rms_norm.default(arg0_1, None, None, 1e-06, 0.0, 'f32 pow unit=f32>bf16 out=bf16')
    getitem = getitem(rms_norm, 0)
    return (getitem)
lowered:
    the same
""",
        )

    def test_functional_rms_norm(self):
        block = blocks.FunctionalNorm().bfloat16()
        text = after_each_pass(block, self.x, lowering="op")
        self.assertExpectedInline(
            text,
            """\
before autograd:
    rms_norm_default = normfuse.rms_norm.default(l_x, norm_weight, None, 1e-06, 0.0, 'f32 unit=f32 weight=bf16 out=bf16')
    getitem = getitem(rms_norm_default, 0)
    return (getitem)
after autograd:
    rms_norm = normfuse.rms_norm.default(arg1_1, arg0_1, None, 1e-06, 0.0, 'f32 unit=f32 weight=bf16 out=bf16')
    getitem = getitem(rms_norm, 0)
    return (getitem)
lowered:
    the same
""",
        )

    def test_weight_shared_by_two_norms(self):
        block = blocks.SharedWeight().bfloat16()
        text = after_each_pass(block, self.x, self.residual, lowering="op")
        self.assertExpectedInline(
            text,
            """\
before autograd:
    rms_norm_default = normfuse.rms_norm.default(l_x, norm_weight, None, 1e-06, 0.0, 'f32 unit=f32>bf16 weight=bf16 out=bf16')
    getitem = getitem(rms_norm_default, 0)
    rms_norm_default_1 = normfuse.rms_norm.default(l_y, norm_weight, None, 1e-06, 0.0, 'f32 unit=f32>bf16 weight=bf16 out=bf16')
    getitem_1 = getitem(rms_norm_default_1, 0)
    return (getitem, getitem_1)
after autograd:
    rms_norm = normfuse.rms_norm.default(arg0_1, arg1_1, None, 1e-06, 0.0, 'f32 unit=f32>bf16 weight=bf16 out=bf16')
    getitem = getitem(rms_norm, 0)
    rms_norm_1 = normfuse.rms_norm.default(arg2_1, arg1_1, None, 1e-06, 0.0, 'f32 unit=f32>bf16 weight=bf16 out=bf16')
    getitem_2 = getitem(rms_norm_1, 0)
    return (getitem, getitem_2)
lowered:
    the same
""",
        )

    def test_sum_with_three_users(self):
        block = blocks.ThreeUsers().bfloat16()
        text = after_each_pass(block, self.x, self.residual, lowering="op")
        self.assertExpectedInline(
            text,
            """\
before autograd:
    add_rms_norm_default = normfuse.add_rms_norm.default(l_hidden_states, l_residual, norm_weight, None, None, None, None, 1e-06, 0.0, 'f32 unit=f32>bf16 weight=bf16 out=bf16')
    getitem_2 = getitem(add_rms_norm_default, 1)
    getitem_1 = getitem(add_rms_norm_default, 0)
    mul_2 = mul(getitem_2, getitem_2)
    return (getitem_1, mul_2, getitem_2)
after autograd:
    add_rms_norm = normfuse.add_rms_norm.default(arg1_1, arg0_1, arg2_1, None, None, None, None, 1e-06, 0.0, 'f32 unit=f32>bf16 weight=bf16 out=bf16')
    getitem = getitem(add_rms_norm, 0)
    getitem_1 = getitem(add_rms_norm, 1)
    mul = aten.mul.Tensor(getitem_1, getitem_1)
    return (getitem, mul, getitem_1)
lowered:
    the same
""",
        )

    def test_llama_block_with_dynamic_shapes(self):
        block = blocks.LlamaBlock().bfloat16()
        text = after_each_pass(block, self.x, self.residual, dynamic=True, lowering="op")
        self.assertExpectedInline(
            text,
            """\
before autograd:
    add_rms_norm_default = normfuse.add_rms_norm.default(l_hidden_states, l_residual, norm_weight, None, None, None, None, 1e-06, 0.0, 'f32 unit=f32>bf16 weight=bf16 out=bf16')
    getitem_2 = getitem(add_rms_norm_default, 1)
    getitem_1 = getitem(add_rms_norm_default, 0)
    hidden_states_4 = linear(getitem_1, branch_weight, None)
    add_2 = add(getitem_2, hidden_states_4)
    return (add_2)
after autograd:
    add_rms_norm = normfuse.add_rms_norm.default(arg2_1, arg1_1, arg3_1, None, None, None, None, 1e-06, 0.0, 'f32 unit=f32>bf16 weight=bf16 out=bf16')
    getitem = getitem(add_rms_norm, 0)
    getitem_1 = getitem(add_rms_norm, 1)
    permute = aten.permute.default(arg4_1, (1, 0))
    mm = aten.mm.default(getitem, permute)
    add_12 = aten.add.Tensor(getitem_1, mm)
    return (add_12)
lowered:
    add_rms_norm = normfuse.add_rms_norm.default(arg2_1, arg1_1, arg3_1, None, None, None, None, 1e-06, 0.0, 'f32 unit=f32>bf16 weight=bf16 out=bf16')
    getitem = getitem(add_rms_norm, 0)
    getitem_1 = getitem(add_rms_norm, 1)
    permute = aten.permute.default(arg4_1, (1, 0))
    addmm_default = aten.addmm.default(getitem_1, getitem, permute)
    return (addmm_default)
""",
        )

    def test_granite_block_with_dynamic_shapes(self):
        block = blocks.GraniteBlock().bfloat16()
        text = after_each_pass(block, self.x, self.residual, dynamic=True, lowering="op")
        self.assertExpectedInline(
            text,
            """\
before autograd:
    add_rms_norm_default = normfuse.add_rms_norm.default(l_hidden_states, l_residual, norm_weight, None, None, 0.22, None, 1e-06, 0.0, 'f32 unit=f32>bf16 weight=bf16 out=bf16')
    getitem_2 = getitem(add_rms_norm_default, 1)
    getitem_1 = getitem(add_rms_norm_default, 0)
    return (getitem_1, getitem_2)
after autograd:
    add_rms_norm = normfuse.add_rms_norm.default(arg1_1, arg2_1, arg3_1, None, None, 0.22, None, 1e-06, 0.0, 'f32 unit=f32>bf16 weight=bf16 out=bf16')
    getitem = getitem(add_rms_norm, 0)
    getitem_1 = getitem(add_rms_norm, 1)
    return (getitem, getitem_1)
lowered:
    the same
""",
        )
