"""A model without its norms and rotary embeddings: what is left is what they do not cost."""

from __future__ import annotations

import copy
import types
from typing import Any

import torch

ROTATES = "apply_rotary_pos_emb"


class Nothing(torch.nn.Module):
    """In the place of a norm: its input."""

    def forward(self, x: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return x


def without_norms(model: torch.nn.Module) -> torch.nn.Module:
    """A copy that shares every weight, computes no RMSNorm, and turns no query and no key.

    It computes something else, of course; all else in it is as large as in the model.

    Raises:
        ValueError: the model has no module whose class is called a norm.
    """
    shared: dict[int, Any] = {id(one): one for one in (*model.parameters(), *model.buffers())}
    bare = copy.deepcopy(model, shared)
    norms = [path for path, module in bare.named_modules() if "Norm" in type(module).__name__]
    if not norms:
        raise ValueError("a model must have modules whose class is called a norm, got none")
    for path in norms:
        bare.set_submodule(path, Nothing())
    for module in bare.modules():
        forward: Any = type(module).forward
        if isinstance(forward, types.FunctionType) and ROTATES in forward.__code__.co_names:
            module.forward = types.MethodType(_unturned(forward), module)  # type: ignore[assignment]
    return bare


def _unturned(forward: Any) -> Any:
    """The same code where the rotary embedding is a function that returns what it is given."""
    found = types.FunctionType(
        forward.__code__,
        {**forward.__globals__, ROTATES: _not_turned},
        forward.__name__,
        forward.__defaults__,
        forward.__closure__,
    )
    found.__kwdefaults__ = forward.__kwdefaults__
    return found


def _not_turned(*arguments: Any, **_: Any) -> Any:
    """Of q, k, cos, sin: q and k; of x, cos, sin: x."""
    return arguments[:2] if len(arguments) > 3 else arguments[0]
