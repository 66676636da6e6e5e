"""Real architectures, tiny: the gradients of every parameter are as close to float64 as eager's."""

import copy
import functools

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from normfuse.backend import patches
from normfuse.capturing import fresh
from normfuse.passes import inductor
from tests.graphs import ops_in
from tests.test_families import build

# The gradient ops of each, as far as their backward is an op.
BACKWARD = {
    "llama": {"rms_norm_backward", "add_rms_norm_backward"},
    "granite": {"rms_norm_backward", "add_rms_norm_backward"},
    "t5": {"rms_norm_backward", "add_rms_norm_backward"},
    "mamba2": {"rms_norm_backward", "add_rms_norm_backward", "gated_rms_norm_backward"},
    "qwen3": {"rms_norm_backward", "add_rms_norm_backward", "qk_rms_norm_rope_backward"},
    "qwen3_next": {"rms_norm_backward", "add_rms_norm_backward", "gated_rms_norm_backward"},
    "olmo2": {"qk_rms_norm_rope_backward", "rms_norm_add_backward"},
    "gemma2": {"rms_norm_backward", "rms_norm_add_rms_norm_backward"},
    "gemma3_text": {"rms_norm_add_rms_norm_backward", "qk_rms_norm_rope_backward"},
    "gemma4_text@moe": {
        "rms_norm_add_backward",
        "rms_norms_backward",
        "dual_rms_norm_add_rms_norm_backward",
        "qk_rms_norm_rope_backward",
    },
}


class Wide(TorchFunctionMode):
    """Computes in float64 what a model asks to compute in float32."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        args, kwargs = tree_map(_widened, (args, kwargs or {}))
        if function is torch.Tensor.float:
            function = torch.Tensor.double
        return function(*args, **kwargs)


def _widened(argument):
    return torch.float64 if argument is torch.float32 else argument


def parameter_gradients(function, model, inputs):
    """By name, those of the parameters that the first output depends on."""
    torch.manual_seed(0)
    output = function(**inputs)
    output = output[0] if not hasattr(output, "logits") else output.logits
    upstream = torch.randn(output.shape).to(output.dtype)
    parameters = dict(model.named_parameters())
    grads = torch.autograd.grad(output, parameters.values(), upstream, allow_unused=True)
    return {name: g for name, g in zip(parameters, grads, strict=True) if g is not None}


def error(grad, exact):
    return (grad.double() - exact).norm().item()


@pytest.mark.guarantee
@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, torch.bfloat16) for name in BACKWARD]
    + [(name, torch.float32) for name in ("gemma3_text", "qwen3")],
)
def test_gradients_are_as_close_to_float64_as_eagers(name, dtype):
    model, inputs = build(name, dtype)
    found = set()

    def note(graph):
        found.update(ops_in(graph.python_code("self").src))

    settings = patches(None, {"normfuse.lowering": "op"})
    hook = "post_grad_custom_post_pass"
    settings[hook] = inductor.chained(hook, inductor.Hook(note, "note"), settings)
    interpret = functools.partial(inductor.interpret_graph, patches=settings)
    ours = parameter_gradients(torch.compile(fresh(model), backend=interpret), model, inputs)

    eager = parameter_gradients(model, model, inputs)
    wide = copy.deepcopy(model).double()
    wide.set_experts_implementation("eager")  # a grouped product takes no float64
    with Wide():
        exact = parameter_gradients(wide, wide, inputs)
    assert found >= BACKWARD[name]
    assert ours.keys() == eager.keys()
    for parameter, grad in ours.items():
        truth = exact[parameter]
        rounding = 0.5 * torch.finfo(dtype).eps * truth.norm().item()
        allowed = 2 * error(eager[parameter], truth) + rounding
        assert error(grad, truth) <= allowed, parameter
