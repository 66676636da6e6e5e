"""A model as Dynamo has never seen it, so that a capture neither uses nor spoils compiled code."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch

_LINES = itertools.count(1)


def fresh(model: Any) -> Callable[..., Any]:
    """A function of its own around the model, without what the user has compiled of it.

    Dynamo keeps compiled code, and counts recompilations, by code object: every call makes one. It
    keeps what it learned of changing numbers by file and line: every call has a line of its own.
    """
    self = _uncompiled(model)

    # The variable is called `self` because Dynamo writes module paths from it, as in a forward.
    def call(*args: Any, **kwargs: Any) -> Any:
        return self(*args, **kwargs)

    code = call.__code__.replace(co_firstlineno=next(_LINES))
    return FunctionType(code, call.__globals__, call.__name__, None, call.__closure__)


def _uncompiled(model: Any) -> Any:
    """The module or function behind `torch.compile(model)` or `model.compile()`."""
    model = getattr(model, "_orig_mod", model)
    model = getattr(model, "_torchdynamo_orig_callable", model)
    if isinstance(model, torch.nn.Module) and model._compiled_call_impl is not None:
        return model._call_impl
    return model
