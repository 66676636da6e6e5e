"""A diffusion transformer's block: norms that are modulated by the time step, and gates."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from normfuse.explain import explain_with
from normfuse.testing import capture

WIDTH = 16


class RMSNorm(nn.Module):
    """`RMSNorm` of diffusers 0.42.1: only the root is float32, the product is promoted to it."""

    def __init__(self, eps=1e-5):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.rand(WIDTH) + 0.5)

    def forward(self, hidden_states):
        variance = hidden_states.to(torch.float32).pow(2).mean(-1, keepdim=True)
        hidden_states = hidden_states * torch.rsqrt(variance + self.eps)
        if self.weight.dtype in [torch.float16, torch.bfloat16]:
            hidden_states = hidden_states.to(self.weight.dtype)
        return hidden_states * self.weight


class LuminaRMSNormZero(nn.Module):
    """`LuminaRMSNormZero`: the norm, and the scales and gates of the block."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(WIDTH, 4 * WIDTH)
        self.norm = RMSNorm()

    def forward(self, x, emb):
        emb = self.linear(F.silu(emb))
        scale_msa, gate_msa, scale_mlp, gate_mlp = emb.chunk(4, dim=1)
        x = self.norm(x) * (1 + scale_msa[:, None])
        return x, gate_msa, scale_mlp, gate_mlp


class Lumina2TransformerBlock(nn.Module):
    """`Lumina2TransformerBlock`, with a linear layer for attention."""

    def __init__(self):
        super().__init__()
        self.norm1 = LuminaRMSNormZero()
        self.attn = nn.Linear(WIDTH, WIDTH, bias=False)
        self.norm2 = RMSNorm()
        self.ffn_norm1 = RMSNorm()
        self.feed_forward = nn.Linear(WIDTH, WIDTH, bias=False)
        self.ffn_norm2 = RMSNorm()

    def forward(self, hidden_states, temb):
        norm_hidden_states, gate_msa, scale_mlp, gate_mlp = self.norm1(hidden_states, temb)
        attn_output = self.attn(norm_hidden_states)
        hidden_states = hidden_states + gate_msa.unsqueeze(1).tanh() * self.norm2(attn_output)
        mlp_output = self.feed_forward(self.ffn_norm1(hidden_states) * (1 + scale_mlp.unsqueeze(1)))
        return hidden_states + gate_mlp.unsqueeze(1).tanh() * self.ffn_norm2(mlp_output)


@pytest.mark.guarantee
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "f32"])
def test_a_modulated_block_has_the_bits_of_eager(dtype):
    block = Lumina2TransformerBlock().to(dtype)
    hidden_states, time = torch.randn(2, 6, WIDTH).to(dtype), torch.randn(2, WIDTH).to(dtype)

    with torch.no_grad():
        report = explain_with(block, (hidden_states, time), options={"normfuse.lowering": "op"})
        rewritten = capture(block, lowering="op")(hidden_states, time)

        assert torch.equal(rewritten, block(hidden_states, time))
    assert [site.op for site in report.sites] == [
        "modulated_rms_norm",
        "rms_norm",
        "modulated_rms_norm",
        "rms_norm",
    ]
