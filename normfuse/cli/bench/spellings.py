"""The chains as users write them: what eager runs, what Inductor compiles, what we must equal.

Spelled as in transformers 5.17.0, every rounding included; only modules became functions.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

EPS = 1e-6

Tensor = torch.Tensor
Norm = Callable[[Tensor, Tensor], Tensor]


def llama(hidden_states: Tensor, weight: Tensor) -> Tensor:
    """`LlamaRMSNorm`: rounds to the input's type before the weight."""
    input_dtype = hidden_states.dtype
    hidden_states = hidden_states.to(torch.float32)
    variance = hidden_states.pow(2).mean(-1, keepdim=True)
    hidden_states = hidden_states * torch.rsqrt(variance + EPS)
    return weight * hidden_states.to(input_dtype)


def olmo2(hidden_states: Tensor, weight: Tensor) -> Tensor:
    """`Olmo2RMSNorm`: the weight multiplies in float32, then one rounding."""
    input_dtype = hidden_states.dtype
    hidden_states = hidden_states.to(torch.float32)
    variance = hidden_states.pow(2).mean(-1, keepdim=True)
    hidden_states = hidden_states * torch.rsqrt(variance + EPS)
    return (weight * hidden_states).to(input_dtype)


def gemma3(x: Tensor, weight: Tensor) -> Tensor:
    """`Gemma3RMSNorm`: one rounding, after `1 + weight`."""
    h = x.float()
    output = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS)
    output = output * (1.0 + weight.float())
    return output.type_as(x)


def gemma4_unit(hidden_states: Tensor) -> Tensor:
    """`Gemma4RMSNorm(with_scale=False)`."""
    float_states = hidden_states.float()
    mean_squared = float_states.pow(2).mean(-1, keepdim=True) + EPS
    return (float_states * torch.pow(mean_squared, -0.5)).type_as(hidden_states)


def gemma4(hidden_states: Tensor, weight: Tensor) -> Tensor:
    """`Gemma4RMSNorm`."""
    normed_output = gemma4_unit(hidden_states.float())
    return (normed_output * weight.float()).type_as(hidden_states)


def add_rms_norm(hidden_states: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    """`LlamaDecoderLayer`: the residual add, and the norm before the next branch."""
    hidden_states = residual + hidden_states
    return llama(hidden_states, weight), hidden_states


def rms_norm_add(hidden_states: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    """`Olmo2DecoderLayer`: the norm follows the branch."""
    return (residual + olmo2(hidden_states, weight),)


def sandwich(
    hidden_states: Tensor, residual: Tensor, weight_1: Tensor, weight_2: Tensor
) -> tuple[Tensor, ...]:
    """`Gemma3DecoderLayer`: norm after the branch, add, norm before the next."""
    hidden_states = residual + gemma3(hidden_states, weight_1)
    return gemma3(hidden_states, weight_2), hidden_states


def dual(
    dense: Tensor,
    experts: Tensor,
    residual: Tensor,
    weight_1: Tensor,
    weight_2: Tensor,
    weight_3: Tensor,
    layer_scalar: Tensor,
) -> tuple[Tensor, ...]:
    """`Gemma4TextDecoderLayer` with experts, its end."""
    hidden_states = gemma4(dense, weight_1) + gemma4(experts, weight_2)
    return ((residual + gemma4(hidden_states, weight_3)) * layer_scalar,)


def dual_and_norm(
    dense: Tensor,
    experts: Tensor,
    residual: Tensor,
    weight_1: Tensor,
    weight_2: Tensor,
    weight_3: Tensor,
    weight_4: Tensor,
    layer_scalar: Tensor,
) -> tuple[Tensor, ...]:
    """The same, and the norm that begins the next layer."""
    (total,) = dual(dense, experts, residual, weight_1, weight_2, weight_3, layer_scalar)
    return gemma4(total, weight_4), total


def expert_norms(
    residual: Tensor, weight: Tensor, router_scale: Tensor, weight_2: Tensor
) -> tuple[Tensor, ...]:
    """`Gemma4TextDecoderLayer` with experts: dense branch, router and experts read one residual."""
    router = gemma4_unit(residual) * router_scale * residual.shape[-1] ** -0.5
    return gemma4(residual, weight), router, gemma4(residual, weight_2)


def l2_norm(x: Tensor) -> tuple[Tensor, ...]:
    """`l2norm` of Qwen3-Next, in the type of x."""
    inv_norm = torch.rsqrt((x * x).sum(dim=-1, keepdim=True) + EPS)
    return (x * inv_norm,)


def gated(hidden_states: Tensor, gate: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    """`Qwen3NextRMSNormGated`."""
    input_dtype = hidden_states.dtype
    hidden_states = llama(hidden_states, weight)
    hidden_states = hidden_states * F.silu(gate.to(torch.float32))
    return (hidden_states.to(input_dtype),)


def modulated(hidden_states: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, ...]:
    """`VibeVoiceDiffusionHeadFinalLayer`."""
    normed = F.rms_norm(hidden_states, (hidden_states.shape[-1],), eps=EPS)
    return (normed * (1 + scale) + shift,)


def heads(qkv: Tensor, heads_q: int, heads_k: int, width: int) -> tuple[Tensor, Tensor]:
    """Packed (B, T, (heads_q + 2 heads_k) * width) -> q and k, (B, T, heads, width), views."""
    rows = qkv.view(*qkv.shape[:-1], -1, width)
    return rows[..., :heads_q, :], rows[..., heads_q : heads_q + heads_k, :]


def rotate_half(x: Tensor) -> Tensor:
    """`rotate_half` of Llama."""
    x1 = x[..., : x.shape[-1] // 2]
    x2 = x[..., x.shape[-1] // 2 :]
    return torch.cat((-x2, x1), dim=-1)


def apply_rotary_pos_emb(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """The same of Llama, for q and k (B, heads, T, width), cos and sin (B, T, width)."""
    cos = cos.unsqueeze(1)
    sin = sin.unsqueeze(1)
    q_embed = (q * cos) + (rotate_half(q) * sin)
    k_embed = (k * cos) + (rotate_half(k) * sin)
    return q_embed, k_embed
