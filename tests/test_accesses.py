"""What torch finds out about our kernels is kept, and is what it would find out again."""

import pytest
import torch
from torch._higher_order_ops import triton_kernel_wrap
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from normfuse.ops import ADD_RMS_NORM
from normfuse.passes import accesses, lower
from normfuse.settings import Settings

pytest.importorskip("triton", reason="torch makes the code of kernels with triton")

PLAN = "f32 unit=f32>bf16 weight=bf16 out=bf16"


def stack(layers, eps=1e-6):
    """A function of the residual stream and weights, with as many sums and norms."""

    def layered(x, residual, *weights):
        for weight in weights[:layers]:
            x, residual, _ = ADD_RMS_NORM(
                x, residual, weight, None, None, None, None, eps, 0.0, PLAN
            )
        return x, residual

    return layered


def launches(layers, eps=1e-6, rows=4):
    """What Inductor asks for in each launch: the kernel, its arguments, and what it has of TMA."""
    with FakeTensorMode():
        shapes = [(rows, 64)] * 2 + [(64,)] * layers
        inputs = [torch.empty(shape, dtype=torch.bfloat16) for shape in shapes]
        module = make_fx(stack(layers, eps))(*inputs)
    lower.Lower(Settings("triton"))(module.graph)
    table = triton_kernel_wrap.kernel_side_table
    return [
        (
            table.get_kernel(node.kwargs["kernel_idx"]),
            {
                **{name: value_of(one) for name, one in node.kwargs["kwargs"].items()},
                **table.get_constant_args(node.kwargs["constant_args_idx"]),
            },
            {},
        )
        for node in module.graph.nodes
        if node.target is triton_kernel_wrap.triton_kernel_wrapper_functional
    ]


def value_of(argument):
    return argument.meta["val"] if isinstance(argument, torch.fx.Node) else argument


def analysis():
    found = (getattr(triton_kernel_wrap, name, None) for name in accesses.ANALYSES)
    return next(one for one in found if one is not None)


@pytest.fixture
def generated(kernels_on_cpu, monkeypatch):
    """Every kernel whose code torch generates, from an empty memory on."""
    monkeypatch.setattr(accesses, "_known", {})
    generate, kernels = triton_kernel_wrap.generate_ttir, []

    def noted(kernel, *arguments):
        kernels.append(kernel)
        return generate(kernel, *arguments)

    monkeypatch.setattr(triton_kernel_wrap, "generate_ttir", noted)
    return kernels


@pytest.mark.guarantee
def test_launches_that_agree_are_looked_at_once(generated):
    asked = launches(layers=4)
    for arguments in asked:
        analysis()(*arguments)

    assert len(asked) == 4
    assert len(generated) == 1


@pytest.mark.guarantee
def test_what_is_kept_is_what_torch_finds_again(generated):
    for arguments in launches(layers=2):
        assert analysis()(*arguments) == analysis().__wrapped__(*arguments)


def test_a_result_is_the_callers_own(generated):
    arguments, *_ = launches(layers=1)

    assert analysis()(*arguments) is not analysis()(*arguments)


@pytest.mark.parametrize("other", [{"eps": 1e-5}, {"rows": 5}])
def test_another_constant_or_number_is_another_launch(generated, other):
    for one in ({}, other):
        for arguments in launches(layers=1, **one):
            analysis()(*arguments)

    assert len(accesses._known) == 2


def test_another_type_is_another_launch(generated):
    kernel, arguments, tma = launches(layers=1)[0]
    with FakeTensorMode():
        residual = torch.empty(4, 64, dtype=torch.float32)
    analysis()(kernel, {**arguments, "residual_ptr": residual}, tma)

    assert len(accesses._known) == 2


def test_kernels_of_others_are_asked_about_every_time():
    answers = iter(range(10))

    class Theirs:
        __module__ = "their.kernels"

    remembered = accesses._remembering(lambda *_: next(answers))

    assert [remembered(Theirs(), {"x": 1}, {}) for _ in range(3)] == [0, 1, 2]


def test_a_torch_without_the_analysis_is_left_alone(monkeypatch):
    for name in accesses.ANALYSES:
        monkeypatch.delattr(triton_kernel_wrap, name, raising=False)

    accesses.remember_accesses()

    assert not any(hasattr(triton_kernel_wrap, name) for name in accesses.ANALYSES)
