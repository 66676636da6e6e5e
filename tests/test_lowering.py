"""What an op becomes: the plain decomposition, a kernel's launch, or itself."""

import pytest
import torch
import torch._inductor.config
from expecttest import TestCase
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import normfuse
from normfuse import tuning
from normfuse.explain import explain_with
from normfuse.ops import (
    ADD_RMS_NORM,
    DUAL_RMS_NORM_ADD,
    DUAL_RMS_NORM_ADD_RMS_NORM,
    GATED_RMS_NORM,
    QK_RMS_NORM_ROPE,
    RMS_NORM,
    RMS_NORMS,
)
from normfuse.passes import choice, lower
from normfuse.settings import Settings
from normfuse.tuning import Document, Entry, Key, Measurement, minor
from tests import blocks
from tests.blocks import activation
from tests.graphs import render

triton = pytest.importorskip("triton")

LLAMA = "f32 unit=f32>bf16 weight=bf16 out=bf16"


def lowered(function, *shapes, lowering="triton"):
    """The graph of a function of bfloat16 tensors, after the last pass."""
    with FakeTensorMode():
        inputs = [torch.empty(shape, dtype=torch.bfloat16) for shape in shapes]
        module = make_fx(function)(*inputs)
    lower.Lower(Settings(lowering))(module.graph)
    module.graph.lint()
    return module.graph


def add_norm(x, residual, weight):
    y, total, _ = ADD_RMS_NORM(x, residual, weight, None, None, None, None, 1e-6, 0.0, LLAMA)
    return y, total


HEADS, TABLES = [(2, 4, 5, 128), (2, 2, 5, 128)], [(2, 1, 5, 128)] * 2


def turned_heads(q, k, weight_q, weight_k, cos, sin):
    turns = [f"half {q.shape[-1]} in=bf16 out=bf16"] * 2
    numbers = ([1e-6] * 2, [0.0] * 2)
    return QK_RMS_NORM_ROPE([q, k], [weight_q, weight_k], cos, sin, *numbers, [LLAMA] * 2, turns)[
        :2
    ]


def targets(graph):
    return [str(node.target) for node in graph.nodes if node.op == "call_function"]


@pytest.mark.usefixtures("kernels_on_cpu")
class TestTriton:
    def test_no_op_of_ours_is_left(self):
        graph = lowered(add_norm, (4, 8), (4, 8), (8,))
        assert [target for target in targets(graph) if "normfuse" in target] == []
        assert targets(graph).count("triton_kernel_wrapper_functional") == 1

    def test_results_that_nobody_uses_are_not_stored(self):
        graph = lowered(lambda *inputs: add_norm(*inputs)[0], (4, 8), (4, 8), (8,))
        (launch,) = [node for node in graph.nodes if "triton" in str(node.target)]
        assert set(launch.kwargs["kwargs"]) >= {"x_ptr", "residual_ptr", "weight_ptr", "y_ptr"}
        assert not {"total_ptr", "rstd_ptr"} & set(launch.kwargs["kwargs"])

    def test_only_results_are_written(self):
        graph = lowered(add_norm, (4, 8), (4, 8), (8,))
        (launch,) = [node for node in graph.nodes if "triton" in str(node.target)]
        assert launch.kwargs["tensors_to_clone"] == ["y_ptr", "total_ptr"]

    def test_q_k_and_rope_are_one_launch_that_writes_the_heads_alone(self):
        graph = lowered(turned_heads, *HEADS, (128,), (128,), *TABLES)
        (launch,) = [node for node in graph.nodes if "triton" in str(node.target)]
        assert launch.kwargs["tensors_to_clone"] == ["y_1_ptr", "y_2_ptr"]
        assert not {"x_3_ptr", "rstd_1_ptr"} & set(launch.kwargs["kwargs"])

    @pytest.mark.parametrize(
        ("gpu", "inline_us", "launches"),
        [("A GPU", 12.0, 1), ("A GPU", 10.1, 0), ("A GPU", 0.1, 0), ("Another GPU", 12.0, 0)],
    )
    def test_auto_takes_the_kernel_where_it_was_measured(
        self, gpu, inline_us, launches, monkeypatch, tmp_path
    ):
        monkeypatch.setenv("NORMFUSE_CACHE_DIR", str(tmp_path))
        monkeypatch.setattr(choice, "device_name", lambda device: gpu)
        turn = "half 128 in=bf16 out=bf16"
        version = minor(torch.__version__)
        key = Key(
            "A GPU", version, "qk_rms_norm_rope", (LLAMA, LLAMA, turn, turn), (128,) * 2, "bf16"
        )
        measurement = Measurement(2 * (4 + 2) * 5, (), inline_us, 10.0)
        provenance = ("A GPU", torch.__version__, "3.6.0", "0.1", "2026-01-31", "a test")
        tuning.tables().add(Document(*provenance, (Entry(key, measurement),)))
        graph = lowered(turned_heads, *HEADS, (128,), (128,), *TABLES, lowering="auto")
        assert targets(graph).count("triton_kernel_wrapper_functional") == launches
        assert not [target for target in targets(graph) if "normfuse" in target]

    def test_the_norms_of_one_value_are_one_launch(self):
        def norms(x, v, w):
            plans = [LLAMA, "f32 unit=f32>bf16 out=bf16", LLAMA]
            return RMS_NORMS(x, [v, w], 1e-6, [0.0] * 3, [1.0, 0.3, 1.0], plans)[:3]

        graph = lowered(norms, (4, 8), (8,), (8,))
        (launch,) = [node for node in graph.nodes if "triton" in str(node.target)]
        assert launch.kwargs["tensors_to_clone"] == ["y_1_ptr", "y_2_ptr", "y_3_ptr"]
        assert not {"weight_2_ptr", "y_4_ptr", "rstd_ptr"} & set(launch.kwargs["kwargs"])

    def test_the_end_of_a_layer_and_the_next_norm_are_one_launch(self):
        def end(x_1, x_2, residual, scale, *weights):
            scales, norms = (None, scale, None, None), (1e-6, 0.0, LLAMA) * 4
            return DUAL_RMS_NORM_ADD_RMS_NORM(x_1, x_2, residual, *weights, *scales, *norms)[:2]

        graph = lowered(end, *[(4, 8)] * 3, (1,), *[(8,)] * 4)
        (launch,) = [node for node in graph.nodes if "triton" in str(node.target)]
        assert launch.kwargs["tensors_to_clone"] == ["y_ptr", "total_ptr"]

    def test_the_end_of_a_layer_without_a_next_norm(self):
        def end(x_1, x_2, residual, *weights):
            norms = (1e-6, 0.0, LLAMA) * 3
            return DUAL_RMS_NORM_ADD(x_1, x_2, residual, *weights, *[None] * 4, *norms)[0]

        graph = lowered(end, *[(4, 8)] * 3, *[(8,)] * 3)
        (launch,) = [node for node in graph.nodes if "triton" in str(node.target)]
        assert launch.kwargs["tensors_to_clone"] == ["total_ptr"]
        assert not {"y_ptr", "weight_4_ptr"} & set(launch.kwargs["kwargs"])

    def test_layers_share_one_trace_but_no_storage(self):
        def two_layers(x, residual, weight):
            x, residual = add_norm(x, residual, weight)
            return add_norm(x, residual, weight)

        graph = lowered(two_layers, (4, 8), (4, 8), (8,))
        launches = [node for node in graph.nodes if "triton" in str(node.target)]
        buffers = [node.meta["val"] for node in graph.nodes if "empty" in str(node.target)]
        assert len(launches) == 2
        assert launches[0].kwargs["kernel_idx"] == launches[1].kwargs["kernel_idx"]
        assert len({buffer.untyped_storage()._cdata for buffer in buffers}) == len(buffers) == 4

    def test_groups_are_the_rows_of_a_launch(self):
        def gated_groups(packed, weight):
            x, gate = packed.chunk(2, dim=-1)
            gating = "gate=f32 factor=f32 product=f32 out=f32"
            norm = (1e-6, 0.0, 2, True, "silu", LLAMA, gating)
            return GATED_RMS_NORM(x, gate, weight, *norm)[0]

        graph = lowered(gated_groups, (3, 32), (16,))
        (launch,) = [node for node in graph.nodes if "triton" in str(node.target)]
        passed = launch.kwargs["kwargs"]
        assert {passed["stride_gate_outer"], passed["stride_gate_middle"]} == {32, 8}
        assert passed["num_rows"] == 6
        assert launch.kwargs["tensors_to_clone"] == ["y_ptr"]

    def test_the_launch_pins_the_strides_of_its_inputs(self):
        def norm_of_a_slice(packed, weight):
            return RMS_NORM(packed[:, :8], weight, None, 1e-6, 0.0, LLAMA)[0]

        graph = lowered(norm_of_a_slice, (4, 24), (8,))
        (launch,) = [node for node in graph.nodes if "triton" in str(node.target)]
        _, keywords = launch.meta["eager_input_vals"]
        assert keywords["kwargs"]["x_ptr"].stride() == (24, 1)
        assert launch.kwargs["kwargs"]["stride_x_outer"] == 24


class TestInline(TestCase):
    def test_is_the_decomposition_that_inductor_would_have_had(self):
        graph = lowered(add_norm, (4, 8), (4, 8), (8,), lowering="inline")
        self.assertExpectedInline(
            render(graph),
            """\
    add = aten.add.Tensor(residual_1, x_1)
    convert_element_type = prims.convert_element_type.default(add, torch.float32)
    pow_1 = aten.pow.Tensor_Scalar(convert_element_type, 2)
    mean = aten.mean.dim(pow_1, (-1), True)
    add_1 = aten.add.Tensor(mean, 1e-06)
    rsqrt = aten.rsqrt.default(add_1)
    mul = aten.mul.Tensor(convert_element_type, rsqrt)
    convert_element_type_1 = prims.convert_element_type.default(mul, torch.bfloat16)
    mul_1 = aten.mul.Tensor(weight_1, convert_element_type_1)
    return (mul_1, add)""",
        )


def test_inline_generates_the_code_of_plain_inductor():
    block = blocks.GemmaBlock().bfloat16()
    x, residual = activation(4), activation(4)
    assert generated(block, x, residual, {}) == generated(
        block, x, residual, normfuse.options(lowering="inline")
    )


def generated(block, x, residual, options):
    from torch._inductor.utils import run_and_get_code

    torch._dynamo.reset()
    with torch.no_grad(), torch._inductor.config.patch(force_disable_caches=True):
        _, (code,) = run_and_get_code(torch.compile(block, options=options), x, residual)
    return [line for line in code.splitlines() if not line.lstrip().startswith("#")]


def test_auto_on_the_cpu_is_inline():
    with torch.no_grad():
        report = explain_with(blocks.LlamaBlock(), (activation(4).float(), activation(4).float()))
    (site,) = report.sites
    assert (site.op, site.lowering) == ("add_rms_norm", "inline")
    assert site.lowering_reason == "the activations are on cpu, and the kernels are for CUDA"
