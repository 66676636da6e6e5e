"""Attention over a static cache, or without one, as Hugging Face models spell it."""

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from tests.blocks import LlamaRMSNorm
from tests.rotary import llama as turned

BATCH, HEADS, KEY_HEADS, PLACES = 2, 4, 2, 12


def random(*shape, device="cpu"):
    return torch.randn(shape, device=device).bfloat16()


def repeat_kv(x, copies):
    """`repeat_kv` of transformers."""
    batch, heads, tokens, width = x.shape
    x = x[:, :, None, :, :].expand(batch, heads, copies, tokens, width)
    return x.reshape(batch, heads * copies, tokens, width)


class Attention(nn.Module):
    """Projections, norms if `normed`, rotary embedding, caches, attention.

    The norms are those of each head or, if `normed` is "jointly", of whole projections.
    """

    def __init__(self, width=16, *, normed=True, key_heads=KEY_HEADS, places=PLACES):
        super().__init__()
        self.width, self.normed, self.key_heads = width, normed, key_heads
        self.q_proj = nn.Linear(32, HEADS * width, bias=False)
        self.k_proj = nn.Linear(32, key_heads * width, bias=False)
        self.v_proj = nn.Linear(32, key_heads * width, bias=False)
        counts = (HEADS, key_heads) if normed == "jointly" else (1, 1)
        if normed:
            self.q_norm, self.k_norm = (LlamaRMSNorm(num * width) for num in counts)
        for name in ("keys", "values"):
            self.register_buffer(name, torch.randn(BATCH, key_heads, places, width))
        self.register_buffer("length", torch.tensor(3))
        self.bfloat16()

    def heads(self, x, cos, sin):
        shape = (*x.shape[:-1], -1, self.width)
        q, k, v = (proj(x) for proj in (self.q_proj, self.k_proj, self.v_proj))
        if self.normed == "jointly":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (one.view(shape) for one in (q, k, v))
        if self.normed is True:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (one.transpose(1, 2) for one in (q, k, v))
        return turned(q, cos, sin), turned(k, cos, sin), v

    def positions(self, tokens):
        return torch.arange(tokens, device=self.length.device) + self.length

    def attend(self, q, k, v):
        copies = HEADS // self.key_heads
        return scaled_dot_product_attention(q, repeat_kv(k, copies), repeat_kv(v, copies))


class Cached(Attention):
    """The cache of transformers, which counts how full it is."""

    def forward(self, x, cos, sin):
        q, k, v = self.heads(x, cos, sin)
        rows = self.positions(x.shape[1])
        self.length.add_(x.shape[1])
        self.keys.index_copy_(2, rows, k)
        self.values.index_copy_(2, rows, v)
        return self.attend(q, self.keys, self.values)


class CachedAt(Attention):
    """Positions that are given, put by a subscript."""

    def forward(self, x, cos, sin, rows):
        q, k, v = self.heads(x, cos, sin)
        self.keys[:, :, rows] = k
        self.values[:, :, rows] = v
        return self.attend(q, self.keys, self.values)


class Uncached(Attention):
    def forward(self, x, cos, sin):
        return self.attend(*self.heads(x, cos, sin))


class ReturnsBoth(Uncached):
    """What a model without a static cache returns for its next step."""

    def forward(self, x, cos, sin):
        q, k, v = self.heads(x, cos, sin)
        return self.attend(q, k, v), k, v


def inputs(tokens, width=16, device="cpu"):
    """Activations, and tables of angles as of a model of one's own."""
    angles = torch.rand(1, 1, tokens, width // 2, device=device) * 6
    angles = torch.cat((angles, angles), -1)
    x = random(BATCH, tokens, 32, device=device)
    return x, angles.cos().bfloat16(), angles.sin().bfloat16()
