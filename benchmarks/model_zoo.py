"""Ten models of the benchmarks: real widths, heads and experts, few layers, random weights."""

from __future__ import annotations

from typing import Any

import torch

from normfuse.cli import tiny_models

VOCABULARY = 1024
FILLED = 512  # tokens that a cache holds before a step of decoding
CACHE = 640  # tokens that it has room for

_HEADS_8B = {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}


def _gemma3(width: int, mlp: int, heads: int, head_dim: int) -> tuple[str, dict[str, Any]]:
    sizes = {"hidden_size": width, "intermediate_size": mlp, "head_dim": head_dim}
    heads = {"num_attention_heads": heads, "num_key_value_heads": heads // 2}
    return "gemma3_text", {**sizes, **heads, "sliding_window": 1024}


def _gemma4(width: int, mlp: int, heads: int, **others: Any) -> tuple[str, dict[str, Any]]:
    sizes = {"hidden_size": width, "intermediate_size": mlp, "head_dim": 256}
    heads = {"num_attention_heads": heads, "num_key_value_heads": heads // 2}
    return "gemma4_text", {**sizes, **heads, "hidden_size_per_layer_input": 0, **others}


# A model type of transformers, and what its configuration says beside its defaults.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma3_4b": _gemma3(2560, 10240, 8, 256),
    "gemma3_12b": _gemma3(3840, 15360, 16, 256),
    "gemma3_27b": _gemma3(5376, 21504, 32, 128),
    "gemma4_dense": _gemma4(5376, 21504, 32),
    "gemma4_experts": _gemma4(
        2816,
        2112,
        16,
        enable_moe_block=True,
        num_experts=128,
        top_k_experts=8,
        moe_intermediate_size=704,
        attention_k_eq_v=True,
        num_global_key_value_heads=2,
    ),
    "qwen3_8b": ("qwen3", {"hidden_size": 4096, "intermediate_size": 12288, **_HEADS_8B}),
    "qwen3_30b_a3b": (
        "qwen3_moe",
        {
            "hidden_size": 2048,
            "moe_intermediate_size": 768,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            **_HEADS_8B,
            "num_key_value_heads": 4,
        },
    ),
    "llama3_8b": ("llama", {"hidden_size": 4096, "intermediate_size": 14336, **_HEADS_8B}),
    "olmo2_7b": (
        "olmo2",
        {
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
        },
    ),
    "glm4_9b": (
        "glm4",
        {
            "hidden_size": 4096,
            "intermediate_size": 13696,
            **_HEADS_8B,
            "num_key_value_heads": 2,
        },
    ),
}
# Their attention normalises queries and keys.
QK_NORM = frozenset(MODELS) - {"llama3_8b", "glm4_9b"}


def build(
    name: str,
    device: str,
    layers: int | None,
    *,
    tiny: bool = False,
    num_experts: int | None = None,
) -> torch.nn.Module:
    """A model in bfloat16 and eval mode; its norms' weights differ from one another.

    Args:
        name: of `MODELS`.
        device: where it is made.
        layers: how many; None is one of each kind, at least two.
        tiny: shrink every width, for a run that measures nothing.
        num_experts: where the model has some; None is all of them.
    """
    model_type, sizes = MODELS[name]
    if num_experts is not None and "num_experts" in sizes:
        sizes = {**sizes, "num_experts": num_experts}
    config_class = tiny_models.transformers().CONFIG_MAPPING[model_type]
    config = _tiny(config_class, layers, sizes) if tiny else _cut(config_class, layers, sizes)
    torch.manual_seed(0)
    with torch.device(device):
        auto = tiny_models._auto_class(model_type)
        model = auto.from_config(config, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if "norm" in path:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def _cut(config_class: type[Any], layers: int | None, sizes: dict[str, Any]) -> Any:
    """The configuration at its widths: its first layers, or all kinds in turn if they lack one."""
    base = config_class(**sizes)
    base.allow_global_per_layer_attribute_access = True
    values = tiny_models.shrunk_layer_lists(base, layers)
    lists = [name for name in values if name != "num_hidden_layers"]
    first = {name: list(getattr(base, name))[: values["num_hidden_layers"]] for name in lists}
    if all(set(first[name]) == set(getattr(base, name)) for name in lists):
        values.update(first)
    tokens = tiny_models.shrunk_tokens(base)
    return config_class(**{**sizes, **values, **tokens, "vocab_size": VOCABULARY})


def _tiny(config_class: type[Any], layers: int | None, sizes: dict[str, Any]) -> Any:
    config = tiny_models.tiny_config(config_class, layers)
    for name in ("enable_moe_block", "attention_k_eq_v"):
        if name in sizes:
            setattr(config, name, sizes[name])
    if sizes.get("enable_moe_block"):
        for name, value in {"num_experts": 4, "top_k_experts": 2}.items():
            setattr(config, name, value)
        config.moe_intermediate_size = 32
    return config


def prefill(model: Any, tokens: int) -> dict[str, Any]:
    """Inputs of a forward over one sequence, without a cache."""
    ids = torch.randint(3, 100, (1, tokens), device=model.device)
    return {"input_ids": ids, "use_cache": False}


def prefill_cached(model: Any, tokens: int) -> dict[str, Any]:
    """Inputs of a forward over one sequence, into a static cache with room for 8 tokens more."""
    cache = _cache(model, 1, 1, tokens + 8)
    cache.reset()
    return {**prefill(model, tokens), "past_key_values": cache, "use_cache": True}


def _cache(model: Any, batch: int, filled: int, size: int) -> Any:
    """A static cache that holds `filled` tokens of each sequence."""
    from transformers import StaticCache

    cache = StaticCache(config=model.config, max_cache_len=size)
    prompt = torch.randint(3, 100, (batch, filled), device=model.device)
    with torch.no_grad():
        model(input_ids=prompt, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache


def decode(
    model: Any, batch: int, *, filled: int = FILLED, cache_size: int = CACHE
) -> dict[str, Any]:
    """Inputs of a step of one token for each sequence, over a static cache with `filled` tokens."""
    cache = _cache(model, batch, filled, cache_size)
    return {
        "input_ids": torch.randint(3, 100, (batch, 1), device=model.device),
        "position_ids": torch.full((batch, 1), filled, device=model.device),
        "past_key_values": cache,
        "use_cache": True,
    }


class Rewind:
    """Sets a cache back to how full it was, so that every step is the same step."""

    def __init__(self, inputs: dict[str, Any]) -> None:
        cache = inputs.get("past_key_values")
        self._lengths = [
            (layer, name, value.clone() if isinstance(value, torch.Tensor) else value)
            for layer in (cache.layers if cache is not None else ())
            for name, value in vars(layer).items()
            if name.startswith("cumulative_length")
        ]

    def __call__(self) -> None:
        for layer, name, value in self._lengths:
            if isinstance(value, torch.Tensor):
                getattr(layer, name).copy_(value)
            else:
                setattr(layer, name, value)
