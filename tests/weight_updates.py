"""Models of norms and a linear layer, and every way in which training and serving change them."""

import copy
from functools import cache

import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounter

from tests import float64
from tests.blocks import GemmaRMSNorm, LlamaRMSNorm

WIDTH = 64


class LoRALinear(nn.Module):
    """A linear layer with an adapter, as in PEFT: merged, its product is part of the weight."""

    def __init__(self, width=WIDTH, rank=4):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, width) * width**-0.5)
        self.lora_A = nn.Parameter(torch.randn(rank, width) * width**-0.5)
        self.lora_B = nn.Parameter(torch.randn(width, rank) * 0.1)
        self.merged = False

    def forward(self, x):
        y = F.linear(x, self.weight)
        return y if self.merged else y + F.linear(F.linear(x, self.lora_A), self.lora_B)

    def merge(self):
        self.weight.data += self.lora_B.data @ self.lora_A.data
        self.merged = True

    def unmerge(self):
        self.weight.data -= self.lora_B.data @ self.lora_A.data
        self.merged = False


class Norms(nn.Module):
    """A Llama norm, a projection with an adapter, and, behind a sum, a Gemma norm."""

    def __init__(self):
        super().__init__()
        self.llama = LlamaRMSNorm(WIDTH)
        self.projection = LoRALinear()
        self.gemma = GemmaRMSNorm(WIDTH)

    def forward(self, x):
        return x + self.gemma(x + self.projection(self.llama(x)))

    def exact(self, x):
        """The same in float64."""
        unit = float64.rms_norm(x, self.llama.weight, self.llama.variance_epsilon, 0.0)
        branch = copy.deepcopy(self.projection).double()(unit)
        return x.double() + float64.rms_norm(x + branch, self.gemma.weight, self.gemma.eps, 1.0)


class TiedNorms(Norms):
    """The two norms share one parameter."""

    def __init__(self):
        super().__init__()
        self.gemma.weight = self.llama.weight


def norms_and_input(device, model=Norms):
    """A model in bfloat16 on a device, and its input."""
    x = torch.randn(2, 8, WIDTH, device=device, dtype=torch.bfloat16)
    return model().to(device, torch.bfloat16), x


def data_copy(model):
    """How the weight loaders of serving engines write; it leaves `_version` as it was."""
    for weight in model.parameters():
        weight.data.copy_(torch.randn_like(weight))


def copy_under_no_grad(model):
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn_like(weight))


def copy_under_inference_mode(model):
    with torch.inference_mode():
        for weight in model.parameters():
            weight.copy_(torch.randn_like(weight))


def add_in_place(model):
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(1.0)


def load_state_dict(model):
    model.load_state_dict(other_weights(model))


def load_state_dict_assign(model):
    """It also unties what was tied."""
    model.load_state_dict(other_weights(model), assign=True)


def other_weights(model):
    return {name: torch.randn_like(weight) for name, weight in model.state_dict().items()}


def replace_the_parameters(model):
    for norm in (model.llama, model.gemma):
        norm.weight = nn.Parameter(torch.randn_like(norm.weight))


def replace_the_data(model):
    for weight in model.parameters():
        weight.data = torch.randn_like(weight)


def fused_adamw(model):
    step(torch.optim.AdamW(model.parameters(), lr=0.5, fused=True))


def foreach_adamw(model):
    step(torch.optim.AdamW(model.parameters(), lr=0.5, foreach=True))


def foreach_sgd(model):
    step(torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9, foreach=True))


def step(optimizer):
    """One step with random gradients."""
    for group in optimizer.param_groups:
        for weight in group["params"]:
            weight.grad = torch.randn_like(weight)
    optimizer.step()
    optimizer.zero_grad()


def new_adapter_under_a_merged_one(model):
    """Serving: the adapter's product goes into the weight, and the next adapter is loaded."""
    adapter = model.projection
    adapter.weight.data += adapter.lora_B.data @ adapter.lora_A.data
    for weight in (adapter.lora_A, adapter.lora_B):
        weight.data.copy_(torch.randn_like(weight))


def merge_an_adapter(model):
    data_copy(model)
    model.projection.merge()


def unmerge_an_adapter(model):
    merge_an_adapter(model)
    model.projection.unmerge()


def change_the_type(model):
    model.float()


@cache
def torch_notices_types():
    """Whether torch compiles anew when parameters change their type; 2.11 runs the old code."""
    counter = CompileCounter()
    model = LlamaRMSNorm(WIDTH).bfloat16()
    compiled = torch.compile(model, backend=counter)
    with torch.no_grad():
        for _ in range(2):
            compiled(torch.ones(1, WIDTH))
            model.float()
    return counter.frame_count == 2


def untie(model):
    model.gemma.weight = nn.Parameter(torch.randn_like(model.llama.weight))


def tie(model):
    model.gemma.weight = model.llama.weight


# The values change at their addresses: whoever has recorded a CUDA graph relies on that.
IN_PLACE = (
    data_copy,
    copy_under_no_grad,
    copy_under_inference_mode,
    add_in_place,
    load_state_dict,
    fused_adamw,
    foreach_adamw,
    foreach_sgd,
    new_adapter_under_a_merged_one,
)

# Tensors change for others of their kind: nothing is compiled again, but CUDA graphs are recorded.
ELSEWHERE = (load_state_dict_assign, replace_the_parameters, replace_the_data)

# The model is another one afterwards, and Dynamo's guards see it.
RECOMPILED = (
    (Norms, merge_an_adapter),
    (Norms, unmerge_an_adapter),
    (Norms, change_the_type),
    (Norms, tie),
    (TiedNorms, untie),
    (TiedNorms, load_state_dict_assign),
)
