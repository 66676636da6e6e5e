"""How many kernels the norms, sums and embeddings of one decoder layer take, by the profiler."""

import re
from collections import Counter

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import normfuse
from normfuse.cli import tiny_models
from tests.test_families import GEMMA4

pytestmark = pytest.mark.gpu

# Kernels of ours that one more layer adds.
LAYERS = {
    "llama": {"add_rms_norm": 2, "qk_rms_norm_rope": 1},  # the kernel of `rope`, too
    "qwen3": {"add_rms_norm": 2, "qk_rms_norm_rope": 1},
    "gemma3_text": {"rms_norm_add_rms_norm": 2, "qk_rms_norm_rope": 1},
    # The norms of the residual are one, the end of the layer with the next norm is one.
    "gemma4_text@moe": {
        "qk_rms_norm_rope": 1,
        "rms_norm_add": 1,
        "rms_norms": 1,
        "dual_rms_norm_add": 1,
    },
}
# What the kernels that Inductor writes must not hold: a norm, and RoPE.
NORM_OR_ROPE = ("mean", "rsqrt", "pow", "neg")


def kernels(name, layers):
    """The names of all kernels of one forward, counted."""
    model, config = build(name, layers)
    inputs = {
        key: value.cuda() if isinstance(value, torch.Tensor) else value
        for key, value in tiny_models.example_inputs(model, config).items()
    }
    inputs["use_cache"] = False
    compiled = torch.compile(model, options=normfuse.options(lowering="triton"), dynamic=False)
    with torch.no_grad():
        compiled(**inputs)
        with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as found:
            compiled(**inputs)
            torch.cuda.synchronize()
    names = [
        event.name
        for event in found.events()
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.name.startswith("Mem")
    ]
    torch._dynamo.reset()
    # Inductor numbers its kernels from the first of the graph.
    return Counter(re.sub(r"_\d+$", "", name) for name in names)


def build(name, layers):
    """A tiny model on the GPU, and its configuration."""
    model_type = name.partition("@")[0]
    config = tiny_models.tiny_config(tiny_models.transformers().CONFIG_MAPPING[model_type], layers)
    for attribute, value in GEMMA4.get(name, {}).items():
        setattr(config, attribute, value)
    model = tiny_models._auto_class(model_type).from_config(config)
    return model.to("cuda", torch.bfloat16).eval(), config


@pytest.mark.filterwarnings("ignore:\\s*Online softmax is disabled")  # of the tiny router
@pytest.mark.parametrize("name", LAYERS)
def test_kernels_of_one_layer(name):
    four, three = kernels(name, 4), kernels(name, 3)

    ours = Counter()
    for kernel, number in (four - three).items():
        if "rms_norm" in kernel:
            ours[kernel.split("_kernel")[0]] += number
    assert ours == LAYERS[name], four - three
    theirs = {
        kernel: number
        for kernel, number in four.items()
        if kernel.startswith("triton_") and any(word in kernel for word in NORM_OR_ROPE)
    }
    # The tables of cos and sin are made once in a model.
    assert sum(theirs.values()) < 4, theirs
