"""Rotary embeddings as models spell them, and the attention around them, at tiny sizes."""

import torch
from torch import nn

from tests.blocks import LlamaRMSNorm

BATCH, TOKENS, HEADS, KEY_HEADS, DIM = 2, 5, 4, 2, 16
WIDTH = HEADS * DIM


def rotate_half(x):
    """`rotate_half` of Llama."""
    x1 = x[..., : x.shape[-1] // 2]
    x2 = x[..., x.shape[-1] // 2 :]
    return torch.cat((-x2, x1), dim=-1)


def llama(x, cos, sin):
    return (x * cos) + (rotate_half(x) * sin)


def chunks(x, cos, sin):
    """`rotate_half` with `chunk`, the product commuted."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + sin * torch.cat((-second, first), dim=-1)


def gpt_oss(x, cos, sin):
    """`_apply_rotary_emb` of gpt-oss: tables of half the columns."""
    first, second = torch.chunk(x, 2, dim=-1)
    cos, sin = cos[..., : DIM // 2], sin[..., : DIM // 2]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def cohere(x, cos, sin):
    """`rotate_half` of Cohere: neighbours turn together, in float32."""
    dtype = x.dtype
    x = x.float()
    rotated = torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)
    return ((x * cos) + (rotated * sin)).to(dtype=dtype)


def neighbours(x, cos, sin):
    """Pairs of neighbours, turned apart and stacked again."""
    pairs = x.view(*x.shape[:-1], -1, 2)
    a, b = pairs.unbind(-1)
    cos, sin = cos[..., : DIM // 2], sin[..., : DIM // 2]
    return torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)


def llama4(x, cos, sin):
    """`apply_rotary_emb` of Llama 4: a product of complex numbers."""
    turns = torch.complex(cos.float(), sin.float())[..., : DIM // 2]
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * turns).flatten(-2).type_as(x)


def partial(x, cos, sin):
    """`apply_rotary_pos_emb` of GLM 4 MoE: only the first half of the columns turns."""
    cos, sin = cos[..., : DIM // 2], sin[..., : DIM // 2]
    turned, passed = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    return torch.cat([llama(turned, cos, sin), passed], dim=-1)


def partial_behind(x, cos, sin):
    """As DeepSeek's heads are put together: the last columns turn."""
    cos, sin = cos[..., : DIM // 2], sin[..., : DIM // 2]
    passed, turned = torch.split(x, [DIM // 2, DIM // 2], dim=-1)
    return torch.cat([passed, llama(turned, cos, sin)], dim=-1)


def back(x, cos, sin):
    """By the negative angle."""
    return (x * cos) - (rotate_half(x) * sin)


def back_by_negative_tables(x, cos, sin):
    """`apply_rotary_emb` of nanochat."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos[..., : DIM // 2], sin[..., : DIM // 2]
    return torch.cat((first * cos + second * sin, first * (-sin) + second * cos), dim=-1)


SPELLINGS = {
    function.__name__: function
    for function in (
        *(llama, chunks, gpt_oss, cohere, neighbours, llama4, partial, partial_behind),
        *(back, back_by_negative_tables),
    )
}


def tables(dtype=torch.bfloat16, *, heads_first=True):
    """cos and sin, (batch, 1, tokens, DIM) or (batch, tokens, 1, DIM)."""
    angles = torch.randn(BATCH, TOKENS, DIM // 2).repeat(1, 1, 2)
    axis = 1 if heads_first else 2
    return angles.cos().unsqueeze(axis).to(dtype), angles.sin().unsqueeze(axis).to(dtype)


class Attention(nn.Module):
    """`Qwen3Attention`: projections, norms of the heads, RoPE, attention."""

    def __init__(self, rotary=llama, norm=LlamaRMSNorm):
        super().__init__()
        self.q_proj = nn.Linear(WIDTH, WIDTH, bias=False)
        self.k_proj = nn.Linear(WIDTH, KEY_HEADS * DIM, bias=False)
        self.v_proj = nn.Linear(WIDTH, KEY_HEADS * DIM, bias=False)
        self.q_norm, self.k_norm = norm(DIM), norm(DIM)
        self.rotary = rotary

    def forward(self, x, cos, sin):
        shape = (*x.shape[:-1], -1, DIM)
        q = self.q_norm(self.q_proj(x).view(shape)).transpose(1, 2)
        k = self.k_norm(self.k_proj(x).view(shape)).transpose(1, 2)
        v = self.v_proj(x).view(shape).transpose(1, 2)
        q, k = self.rotary(q, cos, sin), self.rotary(k, cos, sin)
        return attend(q, k, v)


class NormAfterTranspose(Attention):
    """`Gemma3Attention`: the heads are transposed before the norm."""

    def forward(self, x, cos, sin):
        shape = (*x.shape[:-1], -1, DIM)
        q = self.q_norm(self.q_proj(x).view(shape).transpose(1, 2))
        k = self.k_norm(self.k_proj(x).view(shape).transpose(1, 2))
        v = self.v_proj(x).view(shape).transpose(1, 2)
        q, k = self.rotary(q, cos, sin), self.rotary(k, cos, sin)
        return attend(q, k, v)


class OneByOne(Attention):
    """`Gemma4TextAttention`: q is done before k is projected; v is normalised without a weight."""

    def __init__(self, v_norm, **settings):
        super().__init__(**settings)
        self.v_norm = v_norm

    def forward(self, x, cos, sin):
        cos, sin = cos.transpose(1, 2), sin.transpose(1, 2)
        shape = (*x.shape[:-1], -1, DIM)
        q = self.q_norm(self.q_proj(x).view(shape))
        q = self.rotary(q, cos, sin).transpose(1, 2)
        k = self.k_norm(self.k_proj(x).view(shape))
        k = self.rotary(k, cos, sin).transpose(1, 2)
        v = self.v_norm(self.v_proj(x).view(shape)).transpose(1, 2)
        return attend(q, k, v)


class Packed(Attention):
    """q, k and v are slices of one projection, as Phi 3 and fused checkpoints have them."""

    def __init__(self, **settings):
        super().__init__(**settings)
        self.qkv_proj = nn.Linear(WIDTH, (HEADS + 2 * KEY_HEADS) * DIM, bias=False)

    def forward(self, x, cos, sin):
        heads = self.qkv_proj(x).unflatten(-1, (-1, DIM)).transpose(1, 2)
        q, k, v = heads.split([HEADS, KEY_HEADS, KEY_HEADS], dim=1)
        q = self.rotary(self.q_norm(q), cos, sin)
        k = self.rotary(self.k_norm(k), cos, sin)
        return attend(q, k, v)


class WholeProjections(nn.Module):
    """`Olmo2Attention`: whole projections are normalised, heads turn."""

    def __init__(self, norm=LlamaRMSNorm):
        super().__init__()
        self.q_proj = nn.Linear(WIDTH, WIDTH, bias=False)
        self.k_proj = nn.Linear(WIDTH, KEY_HEADS * DIM, bias=False)
        self.q_norm, self.k_norm = norm(WIDTH), norm(KEY_HEADS * DIM)

    def forward(self, x, cos, sin):
        shape = (*x.shape[:-1], -1, DIM)
        q = self.q_norm(self.q_proj(x)).view(shape).transpose(1, 2)
        k = self.k_norm(self.k_proj(x)).view(shape).transpose(1, 2)
        return attend(llama(q, cos, sin), llama(k, cos, sin), k)


class NormAfterRotary(Attention):
    """`HunYuanDenseV1Attention`: RoPE comes before the norms."""

    def forward(self, x, cos, sin):
        shape = (*x.shape[:-1], -1, DIM)
        q = self.q_proj(x).view(shape).transpose(1, 2)
        k = self.k_proj(x).view(shape).transpose(1, 2)
        v = self.v_proj(x).view(shape).transpose(1, 2)
        q, k = self.rotary(q, cos, sin), self.rotary(k, cos, sin)
        return attend(self.q_norm(q), self.k_norm(k), v)


class LowRank(nn.Module):
    """`DeepseekV3Attention`: q and k are projected from normalised values of few columns."""

    RANKS = (24, 16)

    def __init__(self, norm=LlamaRMSNorm):
        super().__init__()
        self.q_a_proj = nn.Linear(WIDTH, self.RANKS[0], bias=False)
        self.q_a_layernorm = norm(self.RANKS[0])
        self.q_b_proj = nn.Linear(self.RANKS[0], WIDTH, bias=False)
        self.kv_a_proj = nn.Linear(WIDTH, self.RANKS[1] + DIM, bias=False)
        self.kv_a_layernorm = norm(self.RANKS[1])
        self.kv_b_proj = nn.Linear(self.RANKS[1], 2 * WIDTH, bias=False)

    def forward(self, x):
        shape = (*x.shape[:-1], -1, DIM)
        q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x))).view(shape).transpose(1, 2)
        compressed, shared = self.kv_a_proj(x).split([self.RANKS[1], DIM], dim=-1)
        kv = self.kv_b_proj(self.kv_a_layernorm(compressed))
        k, v = (part.view(shape).transpose(1, 2) for part in kv.chunk(2, dim=-1))
        k = k + shared.view(shape).transpose(1, 2)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)


def attend(q, k, v):
    k, v = (heads.repeat_interleave(HEADS // KEY_HEADS, dim=1) for heads in (k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v)


def hidden_states(dtype=torch.bfloat16):
    return torch.randn(BATCH, TOKENS, WIDTH, dtype=dtype)
