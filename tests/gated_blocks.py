"""Gated norms, spelled as in transformers 5.17.0, at tiny sizes."""

import torch
import torch.nn.functional as F
from torch import nn

from tests.blocks import WIDTH


class Gated(nn.Module):
    def __init__(self, width=WIDTH, eps=1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width) + 0.5)
        self.variance_epsilon = eps


class Qwen3NextRMSNormGated(Gated):
    """`Qwen3NextRMSNormGated`: Llama's norm, then silu of a float32 gate."""

    def forward(self, hidden_states, gate):
        input_dtype = hidden_states.dtype
        hidden_states = hidden_states.to(torch.float32)
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
        hidden_states = self.weight * hidden_states.to(input_dtype)
        hidden_states = hidden_states * F.silu(gate.to(torch.float32))
        return hidden_states.to(input_dtype)


class KimiLinearRMSNormGated(Gated):
    """`KimiLinearRMSNormGated`: all of it in float32, with `nn.Sigmoid`."""

    def forward(self, hidden_states, gate):
        input_dtype = hidden_states.dtype
        hidden_states = hidden_states.to(torch.float32)
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
        hidden_states = self.weight.to(torch.float32) * hidden_states
        hidden_states = hidden_states * nn.Sigmoid()(gate.to(torch.float32))
        return hidden_states.to(input_dtype)


class MambaRMSNormGated(Gated):
    """`MambaRMSNormGated` of Mamba 2, Bamba and Granite 4: the gate comes first."""

    def forward(self, hidden_states, gate):
        input_dtype = hidden_states.dtype
        hidden_states = hidden_states.to(torch.float32)
        hidden_states = hidden_states * nn.functional.silu(gate.to(torch.float32))
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
        return self.weight * hidden_states.to(input_dtype)


class Zamba2RMSNormGated(Gated):
    """`Zamba2RMSNormGated`: the statistic of groups, then a weight over all of them."""

    def forward(self, hidden_states, gate, group_size=WIDTH // 2):
        input_dtype = hidden_states.dtype
        hidden_states = hidden_states.to(torch.float32)
        hidden_states = hidden_states * nn.functional.silu(gate.to(torch.float32))
        *prefix_dims, last_dim = hidden_states.shape
        group_count = last_dim // group_size
        hidden_states_group = hidden_states.view(*prefix_dims, group_count, group_size)
        variance = hidden_states_group.pow(2).mean(-1, keepdim=True)
        hidden_states_group = hidden_states_group * torch.rsqrt(variance + self.variance_epsilon)
        hidden_states = hidden_states_group.view(*prefix_dims, group_count * group_size)
        return self.weight * hidden_states.to(input_dtype)


class FalconH1RMSNormGated(Gated):
    """`FalconH1RMSNormGated`: groups with a viewed weight, and the gate on either side."""

    def __init__(self, width=WIDTH, eps=1e-6, n_groups=2, norm_before_gate=True):
        super().__init__(width, eps)
        self.n_groups = n_groups
        self.norm_before_gate = norm_before_gate

    def forward(self, hidden_states, gate):
        input_dtype = hidden_states.dtype
        if not self.norm_before_gate and gate is not None:
            hidden_states = hidden_states * F.silu(gate.to(torch.float32))
        batch_size, seq_len, dim = hidden_states.shape
        hidden_states = hidden_states.to(torch.float32)
        hidden_states = hidden_states.view(
            batch_size, seq_len, self.n_groups, int(dim // self.n_groups)
        )
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
        weight = self.weight.view(self.n_groups, int(dim // self.n_groups))
        hidden_states = weight * hidden_states
        hidden_states = hidden_states.view(batch_size, seq_len, dim)
        if self.norm_before_gate and gate is not None:
            hidden_states = hidden_states * F.silu(gate.to(torch.float32))
        return hidden_states.to(input_dtype)
