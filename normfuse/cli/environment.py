"""What `doctor` looks at before any block: versions, devices, and the ways that lead to us."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._triton import has_triton_package

from normfuse import backend
from normfuse.cli.examination import installed_versions
from normfuse.passes.inductor import HOOKS, check_options


@dataclass(frozen=True)
class Check:
    """One thing looked at.

    Attributes:
        name: of what.
        is_good: whether normfuse works with it; a thing that is only optional is good.
        finding: what there is.
        advice: what to do about it; None if nothing.
    """

    name: str
    is_good: bool
    finding: str
    advice: str | None = None


def check_environment() -> list[Check]:
    """Every check, in the order of the report."""
    checks = (_torch, _transformers, _device, _triton, _registration, _hooks, _compilation)
    return [check() for check in checks]


def _torch() -> Check:
    low, high = (f"{major}.{minor}" for major, minor in backend.TESTED_TORCH)
    finding = f"{torch.__version__}, tested: >= {low} and < {high}"
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if backend.TESTED_TORCH[0] <= version < backend.TESTED_TORCH[1]:
        return Check("torch", True, finding)
    return Check(
        "torch", False, finding, f"pip install 'torch>={low},<{high}', or a newer normfuse"
    )


def _transformers() -> Check:
    version = installed_versions()["transformers"]
    if version:
        return Check("transformers", True, version)
    return Check("transformers", True, "not installed: its blocks are skipped")


def _device() -> Check:
    if torch.cuda.is_available():
        return Check("device", True, torch.cuda.get_device_name())
    return Check("device", True, "no CUDA device: fused ops become plain torch again")


def _triton() -> Check:
    if has_triton_package():
        return Check("triton", True, installed_versions()["triton"] or "importable")
    if not torch.cuda.is_available():
        return Check("triton", True, "not importable: only a CUDA device needs it")
    advice = "pip install triton, in the version that this torch asks for"
    return Check("triton", False, "not importable, but there is a CUDA device", advice)


def _registration() -> Check:
    name, entry = "backend", "entry point normfuse of torch_dynamo_backends"
    if "normfuse" in torch._dynamo.list_backends(None):
        return Check(name, True, entry)
    advice = "install normfuse, pip install . in its directory: a source tree registers nothing"
    return Check(name, False, f"no {entry}", advice)


def _hooks() -> Check:
    try:
        check_options(dict.fromkeys(HOOKS))
    except ValueError as error:
        advice = "install a torch in the tested range: without its hooks our passes do not run"
        return Check("hooks", False, str(error), advice)
    return Check("hooks", True, ", ".join(HOOKS))


def _compilation() -> Check:
    """Whether Inductor really calls us; the opaque op needs no compiler and gives eager's bits."""
    name, advice = (
        "compiling",
        "install a torch in the tested range; `explain` has the same trouble",
    )
    x = torch.linspace(-2, 3, 64).reshape(4, 16).bfloat16()
    norm = torch.nn.RMSNorm(16, eps=1e-6, dtype=torch.bfloat16)
    options: dict[str, Any] = {"normfuse.lowering": "op", "fx_graph_cache": False}
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            compiled: Callable[[torch.Tensor], torch.Tensor] = torch.compile(
                norm, backend=backend.normfuse, options=options
            )
            is_equal = torch.equal(compiled(x), norm(x))
    except Exception as error:  # a new version of torch can break in any way
        text = " ".join(str(error).split("\n\n")[0].split())
        return Check(name, False, f"{type(error).__name__}: {text}", advice)
    if not is_equal:
        return Check(name, False, "a compiled norm differs from the same in eager", advice)
    return Check(name, True, "a compiled norm gives the bits of eager")
