"""Any transformers model type as a tiny model: its configuration shrunk, its weights random.

Which norm chains a model has follows from its code and from the kinds of its layers, not from its
widths. So every width shrinks, and of all layers one of each kind stays. Nothing is downloaded.

Written against transformers 5.17. What the model types have in common is in `SIZES`; what only one
of them needs is in `EXCEPTIONS`.
"""

from __future__ import annotations

import os
from typing import Any

import torch

from normfuse.cli.errors import UsageError

VOCABULARY = 128
BATCH, TOKENS = 2, 16


def _sizes(size: int, names: str) -> dict[str, int]:
    return dict.fromkeys(names.split(), size)


# Every name that configurations use for a size, and the size it shrinks to. The sizes fit each
# other: 4 heads of 16 make 64, and 8 state-space heads of 16 make the 128 of an expanded layer.
SIZES: dict[str, int] = {
    # widths
    **_sizes(64, "hidden_size d_model n_embd dim embedding_size word_embed_proj_dim lru_width"),
    **_sizes(128, "intermediate_size ffn_dim encoder_ffn_dim decoder_ffn_dim d_ff ffn_hidden_size"),
    **_sizes(128, "mamba_d_ssm attention_hidden_size"),
    **_sizes(96, "intermediate_size_mlp dense_intermediate_size"),
    **_sizes(64, "shared_intermediate_size"),
    **_sizes(16, "hidden_size_per_layer_input"),
    **_sizes(8, "laurel_rank adapter_rank"),
    # attention
    **_sizes(4, "num_attention_heads encoder_attention_heads decoder_attention_heads num_heads"),
    **_sizes(4, "n_head n_heads swa_num_attention_heads"),
    **_sizes(2, "num_key_value_heads num_global_key_value_heads swa_num_key_value_heads"),
    **_sizes(16, "head_dim attention_head_dim d_kv kv_channels swa_head_dim rotary_dim"),
    **_sizes(32, "global_head_dim attention_head_dim q_lora_rank"),
    **_sizes(16, "kv_lora_rank o_lora_rank qk_nope_head_dim v_head_dim index_head_dim"),
    **_sizes(8, "qk_rope_head_dim rope_head_dim"),
    **_sizes(24, "qk_head_dim"),  # qk_nope_head_dim + qk_rope_head_dim
    **_sizes(2, "o_groups index_n_heads"),
    **_sizes(4, "index_topk"),
    **_sizes(8, "sliding_window attention_window_size attention_chunk_size block_size"),
    # mixtures of experts
    **_sizes(32, "moe_intermediate_size expert_intermediate_size expert_ffn_hidden_size"),
    **_sizes(32, "shared_expert_intermediate_size moe_shared_expert_intermediate_size"),
    **_sizes(4, "num_experts n_routed_experts num_local_experts moe_num_experts"),
    **_sizes(2, "num_experts_per_tok num_experts_per_token top_k_experts moe_top_k moe_topk moe_k"),
    **_sizes(1, "n_shared_experts num_shared_experts moe_num_shared_experts"),
    **_sizes(1, "n_group topk_group num_expert_group decoder_sparse_step"),
    **_sizes(1, "first_k_dense_replace moe_layer_start_index num_dense_layers"),
    # state spaces and linear attention
    **_sizes(16, "state_size ssm_state_size mamba_d_state mamba_d_head mamba_head_dim"),
    **_sizes(16, "mamba_headdim linear_key_head_dim linear_value_head_dim"),
    **_sizes(8, "mamba_n_heads mamba_num_heads n_mamba_heads time_step_rank mamba_dt_rank"),
    **_sizes(8, "mamba_chunk_size chunk_size"),
    **_sizes(2, "mamba_expand expand linear_num_key_heads"),
    **_sizes(4, "linear_num_value_heads"),
    **_sizes(1, "n_groups mamba_n_groups mamba_ngroups"),
    # depth where the configuration has no list of layers, vocabulary, positions
    **_sizes(2, "num_hidden_layers num_layers num_decoder_layers encoder_layers decoder_layers"),
    **_sizes(2, "n_layer n_layers"),
    **_sizes(0, "num_nextn_predict_layers num_mtp_layers mtp_num_layers"),
    **_sizes(VOCABULARY, "vocab_size vocab_size_per_layer_input"),
    **_sizes(64, "max_position_embeddings n_positions"),
}

# Values that win over everything else: defaults that do not build, and sizes tied to each other.
EXCEPTIONS: dict[str, dict[str, Any]] = {
    "deepseek_v2": {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "gemma3n_text": {  # the last two layers reuse keys and values of the first two
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0],
        "intermediate_size": [128] * 4,
    },
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "lfm2_moe": {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"]},
    "mamba2": {"num_heads": 8},
    "qwen4_exp_text": {
        **{"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16},
        **{"indexer_budget": 16, "indexer_compress_ratio": 4, "hc_lowrank": 16},
        **{"heads_per_ngram": 2, "ngram_vocab_size_base": 100, "split_ngram_parts": 8},
        **{"make_ngram_vocab_size_divisible_by": 8, "output_gate_type": "sigmoid"},
    },
    "zamba": {  # the attention of one hybrid layer is shared with the others
        "num_hidden_layers": 3,
        "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
    },
    "zaya": {"num_experts_per_tok": 1},
}


def transformers() -> Any:
    """The library, quiet and offline.

    Raises:
        UsageError: it is not installed.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        import transformers
    except ImportError as error:
        raise UsageError(
            f"transformers must be installed for model types, got '{error}': "
            "pip install 'normfuse[hf]'"
        ) from error
    transformers.logging.set_verbosity_error()
    return transformers


def model_types() -> list[str]:
    """Every model type that transformers can build from a configuration alone."""
    return sorted(set().union(*_model_types_by_auto_class().values()))


def build(model_type: str, dtype: torch.dtype, layers: int | None = None) -> tuple[Any, Any]:
    """A tiny model in eval mode, and its configuration. The same call gives the same weights.

    Raises:
        UsageError: the model takes something else than tokens, or `layers` does not fit it.
    """
    config_class = transformers().CONFIG_MAPPING[model_type]
    # Before anything is built: the vision towers that have no small configuration take seconds.
    _check_takes_tokens(_model_class(model_type, config_class))
    config = tiny_config(config_class, layers)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = _auto_class(model_type).from_config(config)
    return model.eval().to(dtype), config


def example_inputs(model: Any, config: Any) -> dict[str, Any]:
    """Keyword inputs of one forward pass without a cache, 2 x 16 tokens.

    Raises:
        UsageError: the model takes something else than tokens.
    """
    _check_takes_tokens(model)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, 100, (BATCH, TOKENS), generator=generator)
    inputs: dict[str, Any] = {"input_ids": tokens}
    if config.is_encoder_decoder:
        inputs["decoder_input_ids"] = tokens[:, : TOKENS // 2].contiguous()
    if hasattr(config.get_text_config(), "use_cache"):
        inputs["use_cache"] = False
    return inputs


def tiny_config(config_class: type[Any], layers: int | None = None) -> Any:
    """The default configuration of a class with every size shrunk.

    Args:
        config_class: a configuration class of transformers.
        layers: how many layers to keep, the kinds in turn; None is one of each kind, at least two.

    Raises:
        UsageError: the model type has a fixed number of layers, and `layers` is another.
    """
    base = config_class()
    # Gemma 4 has attributes that differ per layer, and reading their common value is opt-in.
    base.allow_global_per_layer_attribute_access = True
    values = {
        **_shrunk_sizes(base),
        **_shrunk_latent_attention(base),
        **shrunk_layer_lists(base, layers),
        **shrunk_tokens(base),
        **_shrunk_parts(base, layers),
    }
    aliases = config_class.attribute_map
    exceptions = EXCEPTIONS.get(config_class.model_type, {})
    config = config_class(**{aliases.get(k, k): v for k, v in values.items()} | exceptions)
    num_layers = getattr(config, "num_hidden_layers", layers)
    if layers is not None and num_layers != layers:
        raise UsageError(
            f"the tiny {config_class.model_type} must have {num_layers} layers, got {layers}: "
            "leave out --layers"
        )
    return config


def layers_to_keep(
    per_layer: dict[str, list[Any]], num_layers: int, wanted: int | None = None
) -> list[int]:
    """The first layer of each kind; a layer's kind is what the per-layer lists say about it.

    >>> layers_to_keep({"layer_types": ["sliding", "sliding", "full", "sliding"]}, 4)
    [0, 2]
    """
    first: dict[tuple[str, ...], int] = {}
    for layer in range(num_layers):
        first.setdefault(tuple(str(values[layer]) for values in per_layer.values()), layer)
    kinds = sorted(first.values())
    count = wanted or max(2, len(kinds))
    return [kinds[i % len(kinds)] for i in range(count)]


def _shrunk_sizes(base: Any) -> dict[str, Any]:
    return {name: size for name, size in SIZES.items() if _is_size(base, name)}


def _is_size(base: Any, name: str) -> bool:
    """Whether the configuration has a number of this name, and lets it be set."""
    declared = getattr(type(base), name, None)
    if isinstance(declared, property) and declared.fset is None:
        return False
    value = getattr(base, name, None)
    if value is None and name in ("head_dim", "num_key_value_heads"):
        return name in base.to_dict()  # derived, by some model types only after it was used
    return isinstance(value, int) and not isinstance(value, bool)


def _shrunk_latent_attention(base: Any) -> dict[str, int]:
    """Multi-head latent attention has no key groups, and its `head_dim` is the rotated part."""
    if not getattr(base, "qk_rope_head_dim", None):
        return {}
    values = {"head_dim": SIZES["qk_rope_head_dim"], "num_key_value_heads": SIZES["num_heads"]}
    return {name: size for name, size in values.items() if _is_size(base, name)}


def shrunk_layer_lists(base: Any, wanted: int | None) -> dict[str, Any]:
    """The per-layer lists, cut to the layers that stay, and their number.

    A list of the numbers of all layers (Llama 4's `moe_layers`) is none of them.
    """
    num_layers = getattr(base, "num_hidden_layers", None)
    if not num_layers or not _is_size(base, "num_hidden_layers"):
        return {}
    per_layer = {
        name: list(values)
        for name, values in base.to_dict().items()
        if isinstance(values, (list, tuple)) and len(values) == num_layers
        if list(values) != list(range(num_layers))
    }
    kept = layers_to_keep(per_layer, num_layers, wanted)
    lists = {name: [values[layer] for layer in kept] for name, values in per_layer.items()}
    return {"num_hidden_layers": len(kept), **lists}


def shrunk_tokens(base: Any) -> dict[str, Any]:
    """Special tokens inside the vocabulary, and rotary sections that fill half a head."""
    names = ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id")
    tokens = {name: getattr(base, name, None) for name in names}
    values: dict[str, Any] = {
        name: 1
        for name, token in tokens.items()
        if isinstance(token, (list, tuple)) or (token is not None and token >= VOCABULARY)
    }
    rope = getattr(base, "rope_parameters", None)
    if isinstance(rope, dict) and "mrope_section" in rope:
        values["rope_parameters"] = {**rope, "mrope_section": [2, 3, 3]}
    return values


def _shrunk_parts(base: Any, layers: int | None) -> dict[str, Any]:
    """The configurations inside a configuration: a text model with its vision tower, and so on."""
    parts = {name: getattr(base, name, None) for name in base.sub_configs}
    return {
        name: tiny_config(type(part), layers) for name, part in parts.items() if part is not None
    }


def _check_takes_tokens(model: Any) -> None:
    if model.main_input_name != "input_ids":
        raise UsageError(
            f"a model type must take input_ids, got one that takes {model.main_input_name}: "
            "pass path.py:factory with inputs of your own"
        )


def _model_class(model_type: str, config_class: type[Any]) -> Any:
    """The class that the auto class would build; of several, the first."""
    found = _auto_class(model_type)._model_mapping[config_class]
    return found[0] if isinstance(found, (list, tuple)) else found


def _auto_class(model_type: str) -> Any:
    """The auto class that builds the most complete model of this type."""
    for name, types in _model_types_by_auto_class().items():
        if model_type in types:
            return getattr(transformers(), name)
    raise AssertionError(f"{model_type} must be one of model_types()")


def _model_types_by_auto_class() -> dict[str, set[str]]:
    """The most complete models first. Reads names only: importing 550 configurations takes long."""
    names = transformers().models.auto.modeling_auto
    return {
        "AutoModelForCausalLM": set(names.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
        "AutoModelForSeq2SeqLM": set(names.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES),
        "AutoModel": set(names.MODEL_MAPPING_NAMES),
    }
