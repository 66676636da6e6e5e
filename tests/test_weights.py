"""Weights may change after compilation, in every way that training and serving know.

Nothing of a weight is folded into the compiled code, so the next call sees the new values, and
changed values alone compile nothing again. `tests/gpu/test_weights_gpu.py` is the same under CUDA
graphs.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_map

from normfuse.explain import explain_with
from normfuse.testing import capture
from tests.blocks import LlamaRMSNorm
from tests.float64 import assert_as_close_as_eager
from tests.weight_updates import (
    ELSEWHERE,
    IN_PLACE,
    RECOMPILED,
    WIDTH,
    Norms,
    TiedNorms,
    change_the_type,
    data_copy,
    fused_adamw,
    norms_and_input,
    torch_notices_types,
)

OP = {"normfuse.lowering": "op"}
UPDATES = [
    *[(Norms, update, "fail_on_recompile") for update in (*IN_PLACE, *ELSEWHERE)],
    *[(TiedNorms, update, "fail_on_recompile") for update in (data_copy, fused_adamw)],
    *[(model, update, "default") for model, update in RECOMPILED],
]


@pytest.fixture(params=UPDATES, ids=lambda case: f"{case[0].__name__}-{case[1].__name__}")
def case(request):
    if request.param[1] is change_the_type and not torch_notices_types():
        pytest.skip("this torch runs the code of the old type, with us and without")
    return request.param


@pytest.mark.guarantee
def test_the_rewritten_graph_sees_the_bits_of_new_weights(case):
    model_class, update, stance = case
    model, x = norms_and_input("cpu", model_class)
    compiled = capture(model, x, lowering="op")
    before = compiled(x)

    update(model)
    with torch.compiler.set_stance(stance):
        after = compiled(x)

    assert torch.equal(after, model(x))
    assert not torch.equal(after, before)


@pytest.mark.guarantee
@torch.no_grad()
def test_the_compiled_model_sees_new_weights(case, device):
    model_class, update, stance = case
    model, x = norms_and_input(device, model_class)
    options = {"normfuse.lowering": "inline"}
    compiled = torch.compile(model, backend="normfuse", options=options)
    before = compiled(x)

    with torch.enable_grad():
        update(model)
    with torch.compiler.set_stance(stance):
        after = compiled(x)

    assert not torch.equal(after, before)
    assert_as_close_as_eager(after, model(x), model.exact(x))


@pytest.mark.guarantee
def test_a_training_step_between_two_calls():
    model, x = norms_and_input("cpu")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5, fused=True)
    compiled = capture(model, x, lowering="op")

    for _ in range(3):
        optimizer.zero_grad()
        compiled(x).float().square().sum().backward()
        optimizer.step()
        assert torch.equal(compiled(x), model(x))


class QuantizedWeight(torch.Tensor):
    """An int8 tensor and its scale, which any operation multiplies first: a quantised weight."""

    @staticmethod
    def __new__(cls, data, scale):
        return torch.Tensor._make_wrapper_subclass(cls, data.shape, dtype=scale.dtype)

    def __init__(self, data, scale):
        self.data_int8, self.scale = data, scale

    def __repr__(self):  # pytest writes Dynamo's log records, and with them this, while it traces
        return f"QuantizedWeight({tuple(self.shape)})"

    def __tensor_flatten__(self):
        return ["data_int8", "scale"], None

    @staticmethod
    def __tensor_unflatten__(parts, context, size, stride):
        return QuantizedWeight(parts["data_int8"], parts["scale"])

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return cls(args[0].data_int8, args[0].scale)

        def plain(value):
            return value.data_int8 * value.scale if isinstance(value, cls) else value

        return function(*tree_map(plain, args), **tree_map(plain, kwargs or {}))


def norm_with_a_quantized_weight():
    norm = LlamaRMSNorm(WIDTH)
    data = torch.randint(-9, 9, (WIDTH,), dtype=torch.int8)
    weight = QuantizedWeight(data, torch.tensor(0.125, dtype=torch.bfloat16))
    norm.weight = nn.Parameter(weight, requires_grad=False)
    return norm, torch.randn(16, WIDTH, dtype=torch.bfloat16)


@pytest.mark.guarantee
@torch.no_grad()
def test_the_parts_of_a_quantised_weight_may_change():
    norm, x = norm_with_a_quantized_weight()
    compiled = capture(norm, x, lowering="op")

    assert explain_with(norm, (x,), options=OP).coverage == 1
    assert torch.equal(compiled(x), norm(x))
    for part in (norm.weight.data_int8, norm.weight.scale):
        before = compiled(x)
        part.mul_(2)
        assert torch.equal(compiled(x), norm(x))
        assert not torch.equal(compiled(x), before)


@pytest.mark.guarantee
def test_a_quantised_weight_is_declined_in_training():
    norm, x = norm_with_a_quantized_weight()

    (site,) = explain_with(norm, (x.requires_grad_(),), options=OP).sites

    assert site.reason == (
        "an operand is a tensor subclass (QuantizedWeight), for which the op has no rule"
    )
    assert torch.equal(capture(norm, lowering="op")(x), norm(x))


@pytest.mark.guarantee
@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
def test_an_integer_weight_is_declined():
    weight = torch.randint(1, 9, (WIDTH,), dtype=torch.int8)
    x = torch.randn(16, WIDTH, dtype=torch.bfloat16, requires_grad=True)

    def norm(x):
        return F.rms_norm(x, (WIDTH,), weight)

    (site,) = explain_with(norm, (x,), options=OP).sites

    assert site.reason == "the weight is torch.int8, which no rounding plan has"
    assert torch.equal(capture(norm, lowering="op")(x), norm(x))
