"""Training steps as Inductor would generate code for them, their launches interpreted."""

import copy

import pytest
import torch
from torch import nn
from torch._higher_order_ops.triton_kernel_wrap import (
    kernel_side_table,
    triton_kernel_wrapper_mutation,
)
from torch._inductor.compile_fx import _recursive_post_grad_passes, compile_fx
from torch._inductor.virtualized import V

from normfuse.backend import patches
from normfuse.passes import memory
from tests.blocks import BranchBetweenNorms, GemmaRMSNorm
from tests.kernels import interpreted
from tests.rotary import BATCH, TOKENS, WIDTH
from tests.test_memory import Turning

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("kernels_on_cpu")


class Attentions(nn.Module):
    """Two layers that turn by the same angles, each computed by the layer itself."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Turning(), Turning()])

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x).transpose(1, 2).reshape(x.shape)
        return x


MODELS = {
    "a residual stream": lambda: nn.Sequential(
        nn.Linear(WIDTH, WIDTH),
        *(BranchBetweenNorms(WIDTH) for _ in range(3)),
        GemmaRMSNorm(WIDTH),
        nn.Linear(WIDTH, 8),
    ),
    "attention": Attentions,
}


class Step(torch.fx.Interpreter):
    """Runs a graph after all passes, its launches in the process that interprets kernels."""

    def __init__(self, graph_module, interpreter, launched):
        super().__init__(graph_module)
        self.interpreter, self.launched = interpreter, launched

    def call_function(self, target, args, kwargs):
        if target is not triton_kernel_wrapper_mutation:
            return super().call_function(target, args, kwargs)
        kernel = kernel_side_table.get_kernel(kwargs["kernel_idx"])
        function = getattr(kernel, "fn", kernel).fn
        constants = kernel_side_table.get_constant_args(kwargs["constant_args_idx"])
        launch = function.__module__, function.__name__, tuple(kwargs["grid"][0])
        self.launched.append(function.__name__)
        arguments = {
            # Assembly, which only a GPU runs, is another spelling of the same roundings.
            name: value.replace("cuda", "none") if isinstance(value, str) else value
            for name, value in {**kwargs["kwargs"], **constants}.items()
        }
        return self.interpreter.submit(interpreted.run, *launch, arguments).result()


def gradients(model, x, interpreter):
    """Of all parameters after one step, and the kernels that were launched."""
    launched = []

    def inner_compile(inner, values, **keywords):
        mode = next(node.meta["val"].fake_mode for node in inner.graph.nodes)
        with V.set_fake_mode(mode):
            _recursive_post_grad_passes(inner, is_inference=False)

        def run(arguments):
            values = [value.detach() for value in arguments]
            arguments.clear()
            return Step(inner, interpreter, launched).run(*values)

        run._boxed_call = True
        return run

    ours = {**patches(None, {"normfuse.lowering": "triton"}), "force_disable_caches": True}

    def backend(graph_module, values):
        return compile_fx(
            graph_module, list(values), inner_compile=inner_compile, config_patches=ours
        )

    torch._dynamo.reset()
    step(torch.compile(model, backend=backend, dynamic=False), x)
    return [parameter.grad for parameter in model.parameters()], launched


def step(function, x):
    function(x).float().square().sum().backward()


@pytest.mark.guarantee
@pytest.mark.parametrize("name", MODELS)
def test_memory_that_is_shared_and_written_over_changes_no_bit(name, interpreter, monkeypatch):
    torch.manual_seed(0)
    model = MODELS[name]().bfloat16()
    x = torch.randn(BATCH, TOKENS, WIDTH).bfloat16()

    ours, launched = gradients(copy.deepcopy(model), x, interpreter)
    monkeypatch.setattr(memory, "PLACES", {})
    apart, _ = gradients(copy.deepcopy(model), x, interpreter)
    exact = copy.deepcopy(model).double()
    step(exact, x.double())

    assert sum("backward" in kernel for kernel in launched) >= 2
    for one, other, parameter in zip(ours, apart, exact.parameters(), strict=True):
        assert torch.equal(one, other)
        error = (one.double() - parameter.grad).norm() / parameter.grad.norm()
        assert error < 8 * torch.finfo(torch.bfloat16).eps
