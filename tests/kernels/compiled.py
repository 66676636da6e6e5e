"""Graphs as Inductor would generate code for them, their launches interpreted."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch
from torch._higher_order_ops.triton_kernel_wrap import (
    kernel_side_table,
    triton_kernel_wrapper_mutation,
)
from torch._inductor.compile_fx import _recursive_post_grad_passes, compile_fx
from torch._inductor.virtualized import V

from normfuse.backend import patches
from tests.kernels import interpreted


class Step(torch.fx.Interpreter):
    """Runs a graph after all passes, its launches in the process that interprets kernels."""

    def __init__(self, graph_module, interpreter, launched):
        super().__init__(graph_module)
        self.interpreter, self.launched = interpreter, launched

    def call_function(self, target, args, kwargs):
        if target is not triton_kernel_wrapper_mutation:
            return super().call_function(target, args, kwargs)
        kernel = kernel_side_table.get_kernel(kwargs["kernel_idx"])
        function = getattr(kernel, "fn", kernel).fn
        constants = kernel_side_table.get_constant_args(kwargs["constant_args_idx"])
        launch = function.__module__, function.__name__, tuple(kwargs["grid"][0])
        self.launched.append(function.__name__)
        arguments = {
            # Assembly, which only a GPU runs, is another spelling of the same roundings.
            name: value.replace("cuda", "none") if isinstance(value, str) else value
            for name, value in {**kwargs["kwargs"], **constants}.items()
        }
        return self.interpreter.submit(interpreted.run, *launch, arguments).result()


def backend(interpreter: ProcessPoolExecutor, launched: list[str]) -> Callable[..., Any]:
    """A backend for torch.compile that takes every launch; `launched` gets their kernels."""

    def inner_compile(inner: Any, fakes: Any, **keywords: Any) -> Callable[..., Any]:
        found = [node.meta.get("val") for node in inner.graph.nodes]
        mode = next(one.fake_mode for one in found if isinstance(one, torch.Tensor))
        with V.set_fake_mode(mode):
            _recursive_post_grad_passes(inner, is_inference=keywords.get("is_inference", False))

        def run(arguments: list[Any]) -> Any:
            values = [one.detach() if isinstance(one, torch.Tensor) else one for one in arguments]
            arguments.clear()
            return Step(inner, interpreter, launched).run(*values)

        run._boxed_call = True  # type: ignore[attr-defined]
        return run

    ours = {**patches(None, {"normfuse.lowering": "triton"}), "force_disable_caches": True}

    def compile_with(graph_module: Any, fakes: Any) -> Any:
        return compile_fx(
            graph_module, list(fakes), inner_compile=inner_compile, config_patches=ours
        )

    return compile_with
