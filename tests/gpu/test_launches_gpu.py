"""How many kernels the norms, sums and embeddings of one decoder layer take, by the profiler."""

from collections import Counter

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import normfuse
from normfuse.cli import tiny_models

pytestmark = pytest.mark.gpu

# Kernels of ours that one more layer adds.
LAYERS = {
    "llama": {"add_rms_norm": 2},
    "qwen3": {"add_rms_norm": 2, "qk_rms_norm_rope": 1},
    "gemma3_text": {"rms_norm_add_rms_norm": 2, "qk_rms_norm_rope": 1},
}
# What the kernels that Inductor writes must not hold: a norm, and RoPE behind a QK-norm.
NORM = ("mean", "rsqrt", "pow")
ROPE = ("cat", "neg")


def kernels(name, layers):
    """The names of all kernels of one forward, counted."""
    model, config = tiny_models.build(name, torch.bfloat16, layers=layers)
    model = model.cuda().eval()
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
    return Counter(names)


@pytest.mark.parametrize("name", LAYERS)
def test_kernels_of_one_layer(name):
    added = kernels(name, 4)
    added.subtract(kernels(name, 3))
    added = {kernel: number for kernel, number in added.items() if number > 0}

    ours = Counter()
    for kernel, number in added.items():
        if "rms_norm" in kernel:
            ours[kernel.split("_kernel")[0]] += number
    assert ours == LAYERS[name], added
    theirs = [kernel for kernel in added if kernel.startswith("triton_")]
    forbidden = NORM if name == "llama" else NORM + ROPE
    assert not [kernel for kernel in theirs for word in forbidden if word in kernel], added
    print(name, dict(added))
