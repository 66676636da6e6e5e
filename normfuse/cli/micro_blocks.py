"""The blocks that `doctor` compiles: one small chain each, and a few real modules of transformers.

A new block is a function of tensors and a line in `BLOCKS`; then `python -m normfuse doctor
--record` puts what it becomes into the table. The chains are spelled as in transformers 5.17.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from normfuse.cli import tiny_models
from normfuse.cli.subject import Subject

EPS = 1e-6
WIDTH = 64
TOKENS = (2, 16, WIDTH)
QUERIES, KEYS, VALUES = (2, 16, 4, 16), (2, 16, 2, 16), (2, 16, 2, 16)
ROTARY = (2, 1, 16, 16)
WEIGHT, HEAD_WEIGHT = (WIDTH,), (16,)


def llama_norm(x: Tensor, weight: Tensor) -> Tensor:
    """`LlamaRMSNorm`: rounds to the input's type before the weight."""
    return weight * _unit(x).to(x.dtype)


def gemma_norm(x: Tensor, weight: Tensor) -> Tensor:
    """`Gemma3RMSNorm`: one rounding, after `1 + weight`."""
    return (_unit(x) * (1.0 + weight.float())).type_as(x)


def olmo2_norm(x: Tensor, weight: Tensor) -> Tensor:
    """`Olmo2RMSNorm`: the weight multiplies in float32, then one rounding."""
    return (weight * _unit(x)).to(x.dtype)


def t5_norm(x: Tensor, weight: Tensor) -> Tensor:
    """`T5LayerNorm`: the input multiplies in its own type."""
    unit = x * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + EPS)
    return weight * unit.to(weight.dtype)


def gemma4_norm(x: Tensor, weight: Tensor) -> Tensor:
    """`Gemma4RMSNorm`: `pow(-0.5)` in place of `rsqrt`."""
    return (_gemma4_unit(x) * weight.float()).type_as(x)


def gemma4_norm_without_weight(x: Tensor) -> Tensor:
    """`Gemma4RMSNorm(with_scale=False)`."""
    return _gemma4_unit(x).type_as(x)


def torch_norm(x: Tensor, weight: Tensor) -> Tensor:
    """`torch.nn.RMSNorm`."""
    return F.rms_norm(x, x.shape[-1:], weight, EPS)


def l2_norm(x: Tensor) -> Tensor:
    """`l2norm` of Qwen3-Next's linear attention."""
    return x * torch.rsqrt((x * x).sum(dim=-1, keepdim=True) + EPS)


def add_norm(branch: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """`LlamaDecoderLayer`: the sum is normalised and used again."""
    total = residual + branch
    return llama_norm(total, weight), total


def granite_add_norm(branch: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """`GraniteDecoderLayer`: the branch is scaled before the sum."""
    return add_norm(branch * 0.22, residual, weight)


def norm_add(branch: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
    """`Olmo2DecoderLayer`: the branch is normalised, then added."""
    return residual + olmo2_norm(branch, weight)


def sandwich(
    branch: Tensor, residual: Tensor, weight_1: Tensor, weight_2: Tensor
) -> tuple[Tensor, Tensor]:
    """`Gemma3DecoderLayer`: norm, add, norm."""
    total = residual + gemma_norm(branch, weight_1)
    return gemma_norm(total, weight_2), total


def scaled_sandwich(
    branch: Tensor, residual: Tensor, weight_1: Tensor, weight_2: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """`Gemma4TextDecoderLayer`: the sum is scaled in place, then the next layer normalises it."""
    total = residual + gemma4_norm(branch, weight_1)
    total *= scale
    return gemma4_norm(total, weight_2), total


def three_norms_of_one(
    x: Tensor, weight_1: Tensor, weight_2: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """`Gemma4TextDecoderLayer` with experts: MLP, experts and router each normalise the sum."""
    return gemma4_norm(x, weight_1), gemma4_norm(x, weight_2), gemma4_norm_without_weight(x)


def sum_of_two_norms(
    mlp: Tensor,
    experts: Tensor,
    residual: Tensor,
    weight_1: Tensor,
    weight_2: Tensor,
    weight_3: Tensor,
) -> Tensor:
    """`Gemma4TextDecoderLayer` with experts: MLP and experts meet, then the residual."""
    total = gemma4_norm(mlp, weight_1) + gemma4_norm(experts, weight_2)
    return residual + gemma4_norm(total, weight_3)


def qk_norm(
    queries: Tensor, keys: Tensor, q_weight: Tensor, k_weight: Tensor
) -> tuple[Tensor, Tensor]:
    """`Qwen3Attention`: each head, then a transposed view."""
    q, k = llama_norm(queries, q_weight), llama_norm(keys, k_weight)
    return q.transpose(1, 2), k.transpose(1, 2)


def qk_norm_rope(
    queries: Tensor, keys: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    """`Qwen3Attention`: each head, then the rotation of its two halves."""
    q, k = qk_norm(queries, keys, q_weight, k_weight)
    return q * cos + _rotate_half(q) * sin, k * cos + _rotate_half(k) * sin


def qkv_norm(
    queries: Tensor, keys: Tensor, values: Tensor, q_weight: Tensor, k_weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """`Gemma4TextAttention`: the values are normalised too, without a weight."""
    q, k = gemma4_norm(queries, q_weight), gemma4_norm(keys, k_weight)
    v = gemma4_norm_without_weight(values)
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def norm_gate(x: Tensor, gate: Tensor, weight: Tensor) -> Tensor:
    """`Qwen3NextRMSNormGated`: the norm, then the gate."""
    return (llama_norm(x, weight) * F.silu(gate.float())).to(x.dtype)


def gate_norm(x: Tensor, gate: Tensor, weight: Tensor) -> Tensor:
    """`MambaRMSNormGated`: the gate, then the norm."""
    return weight * _unit(x.float() * F.silu(gate.float())).to(x.dtype)


def norm_modulated(x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """A diffusion transformer: a norm with a scale and a shift of the timestep."""
    return torch_norm(x, weight) * (1 + scale) + shift


def layer_norm(x: Tensor, weight: Tensor) -> Tensor:
    """`torch.nn.LayerNorm`: no RMS statistic at all."""
    return F.layer_norm(x, x.shape[-1:], weight)


def layer_norm_by_hand(x: Tensor, weight: Tensor) -> Tensor:
    """`CohereLayerNorm`: a mean is subtracted, so it is no RMSNorm in spite of its looks."""
    wide = x.float()
    return (weight.float() * _unit(wide - wide.mean(-1, keepdim=True))).to(x.dtype)


def norm_of_columns(x: Tensor) -> Tensor:
    """A statistic of another axis than the last."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-2, keepdim=True) + EPS)).to(x.dtype)


def _unit(x: Tensor) -> Tensor:
    wide = x.float()
    return wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)


def _gemma4_unit(x: Tensor) -> Tensor:
    wide = x.float()
    return wide * torch.pow(wide.pow(2).mean(-1, keepdim=True) + EPS, -0.5)


def _rotate_half(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


@dataclass(frozen=True)
class MicroBlock:
    """One row of the table: a name, and what to build and run for it."""

    name: str
    build: Callable[[], Subject]
    needs_transformers: bool = False


def chain(function: Callable[..., Any], *shapes: tuple[int, ...]) -> MicroBlock:
    """A function of bfloat16 tensors of these shapes; the same values every time."""

    def build() -> Subject:
        generator = torch.Generator().manual_seed(0)
        args = [torch.randn(shape, generator=generator).bfloat16() for shape in shapes]
        return Subject(function.__name__, function, tuple(args), {})

    return MicroBlock(function.__name__, build)


def from_transformers(path: str, name: str) -> MicroBlock:
    """A norm class of `transformers.models`, on tokens."""

    def build() -> Subject:
        tiny_models.transformers()
        module = importlib.import_module(f"transformers.models.{path}")
        generator = torch.Generator().manual_seed(0)
        norm = getattr(module, name)(WIDTH).bfloat16().eval()
        with torch.no_grad():  # a weight of zeros or ones would hide roundings
            norm.weight.copy_(torch.randn(WEIGHT, generator=generator))
        return Subject(name, norm, (torch.randn(TOKENS, generator=generator).bfloat16(),), {})

    return MicroBlock(name, build, needs_transformers=True)


def tiny_model(model_type: str) -> MicroBlock:
    """A whole model with a layer of each kind, as `explain` builds it."""

    def build() -> Subject:
        model, config = tiny_models.build(model_type, torch.bfloat16)
        return Subject(model_type, model, (), tiny_models.example_inputs(model, config))

    return MicroBlock(f"{model_type}, tiny", build, needs_transformers=True)


BLOCKS = (
    # spellings of one norm
    chain(llama_norm, TOKENS, WEIGHT),
    chain(gemma_norm, TOKENS, WEIGHT),
    chain(olmo2_norm, TOKENS, WEIGHT),
    chain(t5_norm, TOKENS, WEIGHT),
    chain(gemma4_norm, TOKENS, WEIGHT),
    chain(gemma4_norm_without_weight, TOKENS),
    chain(torch_norm, TOKENS, WEIGHT),
    chain(l2_norm, QUERIES),
    # chains
    chain(add_norm, TOKENS, TOKENS, WEIGHT),
    chain(granite_add_norm, TOKENS, TOKENS, WEIGHT),
    chain(norm_add, TOKENS, TOKENS, WEIGHT),
    chain(sandwich, TOKENS, TOKENS, WEIGHT, WEIGHT),
    chain(scaled_sandwich, TOKENS, TOKENS, WEIGHT, WEIGHT, (1,)),
    chain(three_norms_of_one, TOKENS, WEIGHT, WEIGHT),
    chain(sum_of_two_norms, TOKENS, TOKENS, TOKENS, WEIGHT, WEIGHT, WEIGHT),
    chain(qk_norm, QUERIES, KEYS, HEAD_WEIGHT, HEAD_WEIGHT),
    chain(qk_norm_rope, QUERIES, KEYS, HEAD_WEIGHT, HEAD_WEIGHT, ROTARY, ROTARY),
    chain(qkv_norm, QUERIES, KEYS, VALUES, HEAD_WEIGHT, HEAD_WEIGHT),
    chain(norm_gate, TOKENS, TOKENS, WEIGHT),
    chain(gate_norm, TOKENS, TOKENS, WEIGHT),
    chain(norm_modulated, TOKENS, WEIGHT, (2, 1, WIDTH), (2, 1, WIDTH)),
    # near misses, to be left alone
    chain(layer_norm, TOKENS, WEIGHT),
    chain(layer_norm_by_hand, TOKENS, WEIGHT),
    chain(norm_of_columns, TOKENS),
    # what the installed transformers makes of them
    from_transformers("llama.modeling_llama", "LlamaRMSNorm"),
    from_transformers("gemma3.modeling_gemma3", "Gemma3RMSNorm"),
    from_transformers("olmo2.modeling_olmo2", "Olmo2RMSNorm"),
    from_transformers("qwen3.modeling_qwen3", "Qwen3RMSNorm"),
    from_transformers("t5.modeling_t5", "T5LayerNorm"),
    tiny_model("gemma3_text"),
)
