"""The model that a command is about: a transformers model type, or a function of the user's."""

from __future__ import annotations

import difflib
import importlib.util
import inspect
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from normfuse.cli import real_models, tiny_models
from normfuse.cli.errors import UsageError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
DEVICES = ("cpu", "cuda")

HELP = """\
MODEL is one of
  llama, gemma3_text, qwen3, ...   a transformers model type (--list shows all), built from its
                                   configuration alone: tiny widths, one layer of each kind (at
                                   least two), random weights; nothing is downloaded
  path.py:factory                  a function of yours that takes no arguments and returns
                                     (model, args, kwargs)   or
                                     (model, inputs)         inputs: a dict, or a tuple   or
                                     model                   with `example_inputs`, a dict or a
                                                             tuple, beside it in the file
"""


@dataclass(frozen=True)
class Subject:
    """A model in eval mode and the inputs to run it with."""

    title: str
    model: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def to(self, dtype: torch.dtype | None, device: str | None) -> Subject:
        """The same on a device, and in a floating-point type; None leaves it as it is."""
        moved = [_moved(value, dtype, device) for value in self.args]
        named = {name: _moved(value, dtype, device) for name, value in self.kwargs.items()}
        return Subject(self.title, _moved(self.model, dtype, device), tuple(moved), named)


def load_real(spec: str, dtype: str | None, layers: int | None, rows: int | None) -> Subject:
    """The model that `spec` names on the GPU, a model type at its real widths.

    Args:
        spec: a model type, or path.py:factory.
        dtype: as for `load`.
        layers: as for `load`.
        rows: the tokens of a model type, and what a factory gets that has a parameter `rows`. None:
            512 tokens, or the inputs as a factory makes them.

    Raises:
        UsageError: as `load`; or a factory that takes no rows got some.
    """
    _check_layers(layers)
    if ".py:" in spec:
        _check_no_layers(layers)
        return _from_factory(spec, rows).to(DTYPES.get(dtype or ""), "cuda")
    tokens = rows or 512
    model, inputs = real_models.build(spec, tokens, DTYPES[dtype or "bf16"], "cuda", layers)
    return Subject(f"{spec}, {tokens} tokens", model, (), inputs)


def load(spec: str, dtype: str | None, device: str | None, layers: int | None) -> Subject:
    """The model that `spec` names, as `HELP` describes it.

    Args:
        spec: a model type, or path.py:factory.
        dtype: a key of `DTYPES`. None: bfloat16 for a model type, what the factory made otherwise.
        device: one of `DEVICES`. None: the GPU, if there is one, for a model type; where the
            factory put the model otherwise.
        layers: how many layers to build; None is one of each kind.

    Raises:
        UsageError: there is no such model, file, function or device.
    """
    _check_layers(layers)
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda must have a CUDA device, got none: pass --device cpu")
    if ".py:" not in spec:
        default = "cuda" if torch.cuda.is_available() else "cpu"
        return _from_model_type(spec, dtype or "bf16", layers).to(None, device or default)
    _check_no_layers(layers)
    return _from_factory(spec).to(DTYPES.get(dtype or ""), device)


def _check_layers(layers: int | None) -> None:
    if layers is not None and layers < 1:
        raise UsageError(f"--layers must be at least 1, got {layers}: pass the layers to build")


def _check_no_layers(layers: int | None) -> None:
    if layers is not None:
        raise UsageError(
            "--layers must come with a model type, got path.py:factory: choose the layers in it"
        )


def _from_model_type(model_type: str, dtype: str, layers: int | None) -> Subject:
    known = tiny_models.model_types()
    if model_type not in known:
        close = difflib.get_close_matches(model_type, known, n=3)
        advice = f"did you mean {' or '.join(close)}?" if close else "--list shows all of them"
        raise UsageError(
            f"MODEL must be a model type of transformers or path.py:factory, got {model_type}: "
            f"{advice}"
        )
    try:
        model, config = tiny_models.build(model_type, DTYPES[dtype], layers)
        inputs = tiny_models.example_inputs(model, config)
        with torch.no_grad():
            model(**inputs)
    except UsageError:
        raise
    except Exception as error:  # every model type has its own ways to refuse a configuration
        advice = "" if dtype == "fp32" else "try --dtype fp32, or "
        raise UsageError(
            f"{model_type} must build from its shrunk configuration and run, "
            f"got {type(error).__name__}: {error}: {advice}pass path.py:factory with your own model"
        ) from error
    depth = getattr(config.get_text_config(), "num_hidden_layers", "some")
    return Subject(f"{model_type}, tiny, {depth} layers, {dtype}", model, (), inputs)


def _from_factory(spec: str, rows: int | None = None) -> Subject:
    path, _, name = spec.rpartition(":")
    if not Path(path).is_file():
        raise UsageError(f"path.py:factory must name a file, got {path}: correct the path")
    module = _import_file(Path(path))
    factory = getattr(module, name, None)
    if not callable(factory):
        public = [key for key, value in vars(module).items() if _is_public(module, key, value)]
        raise UsageError(
            f"path.py:factory must name a function in {path}, got {name or 'nothing'}: "
            f"it has {', '.join(public) or 'no functions'}"
        )
    made = factory if isinstance(factory, nn.Module) else _made(factory, spec, rows)
    model, args, kwargs = _model_and_inputs(made, getattr(module, "example_inputs", None), spec)
    return Subject(spec, model.eval() if isinstance(model, nn.Module) else model, args, kwargs)


def _made(factory: Any, spec: str, rows: int | None) -> Any:
    if rows is None:
        return factory()
    if "rows" not in inspect.signature(factory).parameters:
        raise UsageError(
            f"{spec} must have a parameter `rows` where --rows is given, got none: "
            "add it, or leave out --rows"
        )
    return factory(rows=rows)


def _import_file(path: Path) -> ModuleType:
    """The file as a module; like a script, it can import its neighbours."""
    name = f"_normfuse_subject_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # Dynamo looks up a function's globals there
    sys.path.insert(0, str(path.parent.resolve()))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.pop(0)
    return module


def _is_public(module: ModuleType, name: str, value: Any) -> bool:
    own = getattr(value, "__module__", None) == module.__name__
    return own and callable(value) and not name.startswith("_")


def _model_and_inputs(
    made: Any, example_inputs: Any, spec: str
) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """What a factory returned, as model, args and kwargs."""
    match made:
        case (model, (tuple() | list()) as args, Mapping() as kwargs):
            return model, tuple(args), dict(kwargs)
        case (model, inputs) if isinstance(inputs, (tuple, list, Mapping)):
            return _model_and_inputs(model, inputs, spec)
    match example_inputs:
        case Mapping() if callable(made):
            return made, (), dict(example_inputs)
        case tuple() | list() if callable(made):
            return made, tuple(example_inputs), {}
    raise UsageError(
        f"{spec} must return (model, args, kwargs) or (model, inputs), got {type(made).__name__} "
        f"and example_inputs {type(example_inputs).__name__}: return the inputs with the model, "
        "or put a tuple or dict named example_inputs into the file"
    )


def _moved(value: Any, dtype: torch.dtype | None, device: str | None) -> Any:
    if isinstance(value, nn.Module):
        return value.to(device=device, dtype=dtype)
    if isinstance(value, torch.Tensor):
        return value.to(device=device, dtype=dtype if value.is_floating_point() else None)
    return value
