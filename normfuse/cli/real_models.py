"""Any transformers model type at the widths that it really has: a few layers, random weights.

What a norm costs follows from widths, heads and rows. So only depth, vocabulary and experts shrink,
which cost memory and change no norm.
"""

from __future__ import annotations

from typing import Any

import torch

from normfuse.cli import tiny_models
from normfuse.cli.errors import UsageError

VOCABULARY = 1024
EXPERTS = 16  # above any number of experts that one token takes
_VOCABULARIES = ("vocab_size", "vocab_size_per_layer_input")
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def build(
    model_type: str,
    rows: int,
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cuda",
    layers: int | None = None,
    **sizes: Any,
) -> tuple[Any, dict[str, Any]]:
    """A model in eval mode, and its keyword inputs for one forward of `rows` tokens.

    Args:
        model_type: of transformers, such as "qwen3".
        rows: tokens of its one sequence.
        dtype: of the weights.
        device: where the model is made.
        layers: how many layers to build; None is one of each kind, at least two.
        **sizes: values of the configuration that differ from its defaults.

    Raises:
        UsageError: there is no such model type, or it takes something else than tokens.
    """
    known = tiny_models.model_types()
    if model_type not in known:
        raise UsageError(
            f"MODEL must be a model type of transformers, got {model_type}: "
            "`python -m normfuse explain --list` shows all of them"
        )
    config = _config(tiny_models.transformers().CONFIG_MAPPING[model_type], layers, sizes)
    torch.manual_seed(0)
    with torch.device(device):
        model = tiny_models._auto_class(model_type).from_config(config, dtype=dtype).eval()
    inputs = tiny_models.example_inputs(model, config)
    return model, {name: _resized(value, rows, device) for name, value in inputs.items()}


def _config(config_class: type[Any], layers: int | None, sizes: dict[str, Any]) -> Any:
    base = config_class(**sizes)
    base.allow_global_per_layer_attribute_access = True  # as in `tiny_models.tiny_config`
    values: dict[str, Any] = {
        **{name: VOCABULARY for name in _VOCABULARIES if getattr(base, name, None)},
        **{name: EXPERTS for name in _EXPERTS if (getattr(base, name, None) or 0) > EXPERTS},
        **tiny_models.shrunk_layer_lists(base, layers),
        **tiny_models.shrunk_tokens(base),
    }
    for name in base.sub_configs:
        part = getattr(base, name, None)
        if part is not None:
            values[name] = _config(type(part), layers, {})
    aliases = config_class.attribute_map
    return config_class(**sizes | {aliases.get(name, name): v for name, v in values.items()})


def _resized(value: Any, rows: int, device: str) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return torch.randint(3, 100, (1, rows), device=device)
