"""Compiles a kernel for a GPU that is not here, with the arguments that its launcher would pass."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from normfuse.ops.destinations import Cached, Destination, Repeated, Writes
from normfuse.ops.gating import Gating
from normfuse.ops.kernels import (
    add_rms_norm,
    dual_rms_norm_add,
    dual_rms_norm_add_rms_norm,
    gated_rms_norm,
    modulated_rms_norm,
    qk_rms_norm_rope,
    rms_norm,
    rms_norm_add,
    rms_norm_add_rms_norm,
    rms_norms,
)
from normfuse.ops.kernels.tile import Launch
from normfuse.ops.modulation import Modulation
from normfuse.ops.residual_sum import Scales
from normfuse.ops.rotation import Rotation
from normfuse.ops.rounding import RoundingPlan

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
    "gfx950": GPUTarget("hip", "gfx950", 64),
}
KERNELS = {
    "rms_norm": rms_norm,
    "rms_norms": rms_norms,
    "gated_rms_norm": gated_rms_norm,
    "gated_rms_norm, gate first": gated_rms_norm,
    "modulated_rms_norm": modulated_rms_norm,
    "add_rms_norm": add_rms_norm,
    "rms_norm_add": rms_norm_add,
    "rms_norm_add_rms_norm": rms_norm_add_rms_norm,
    "dual_rms_norm_add": dual_rms_norm_add,
    "dual_rms_norm_add_rms_norm": dual_rms_norm_add_rms_norm,
}
_POINTERS = {
    torch.int64: "*i64",
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
}


class _Recorder:
    """Stands where a kernel is launched, and keeps what it was launched with."""

    def __call__(self, kernel: Any) -> _Recorder:
        self.kernel = kernel
        return self

    def __getitem__(self, grid: Any) -> Any:
        def record(*arguments: Any, num_warps: int, **constants: Any) -> None:
            runtime = zip(self.kernel.arg_names, arguments, strict=False)
            self.source = _source(self.kernel, dict(runtime), constants)
            self.num_warps = num_warps

        return record


def _source(kernel: Any, runtime: dict[str, Any], constants: dict[str, Any]) -> ASTSource:
    """The signature as Triton specialises it: aligned pointers, multiples of 16, ones and Nones."""
    signature, constants, attributes = {}, dict(constants), {}
    for index, name in enumerate(kernel.arg_names):
        value = runtime.get(name)
        if name in constants or value is None or (isinstance(value, int) and value == 1):
            signature[name] = "constexpr"
            constants.setdefault(name, value)
            continue
        is_pointer = isinstance(value, torch.Tensor)
        signature[name] = _POINTERS[value.dtype] if is_pointer else _integer(value)
        if is_pointer or value % 16 == 0:
            attributes[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, attributes)


def _integer(value: int) -> str:
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def compile_kernel(
    stem: str,
    width: int,
    dtype: torch.dtype,
    plan: RoundingPlan,
    target: str,
    tile: Launch | None = None,
) -> Any:
    """What Triton makes of one kernel on rows of `width`, with a weight of offset 1."""
    gpu, recorder = TARGETS[target], _Recorder()
    op = stem.removesuffix(", gate first")
    tile = tile or Launch.for_shape(width, dtype, plan.compute, op=op, warp_size=gpu.warp_size)
    with _building_for(gpu):
        _record(stem, width, dtype, plan, tile, recorder)
    options = {"num_warps": recorder.num_warps}
    return triton.compile(recorder.source, target=gpu, options=options)


@contextmanager
def _building_for(gpu: GPUTarget) -> Iterator[None]:
    """Launchers ask torch which GPU they build for."""
    hip = torch.version.hip
    torch.version.hip = "cross" if gpu.backend == "hip" else None
    try:
        yield
    finally:
        torch.version.hip = hip


def _record(
    stem: str, width: int, dtype: torch.dtype, plan: RoundingPlan, tile: Launch, recorder: Any
) -> None:
    x = torch.empty(64, width, dtype=dtype, device="meta")
    weight = torch.empty(width, dtype=dtype, device="meta")
    norm, settings = (1e-6, 1.0, plan), {"tile": tile, "wrap": recorder}
    if stem == "rms_norm":
        rms_norm.launch(x, weight, None, *norm, **settings)
    elif stem == "rms_norms":
        weights, offsets, scales = [weight] * 3, [1.0] * 3, [1.0, 0.5, 1.0]  # as in Gemma 4
        rms_norms.launch(x, weights, 1e-6, offsets, scales, [plan] * 3, **settings)
    elif stem.startswith("dual"):
        count = 4 if stem.endswith("norm") else 3
        weights, norms = [weight] * count, [norm] * count
        KERNELS[stem].launch(x, x, x, weights, Scales(), norms, **settings)
    elif KERNELS[stem] is gated_rms_norm:
        gate = (1, "gate first" in stem, "silu", plan, Gating.once(dtype))
        gated_rms_norm.launch(x, x, weight, 1e-6, 1.0, *gate, **settings)
    elif stem == "modulated_rms_norm":
        scale, types = x[:1], Modulation.once(dtype)
        modulated_rms_norm.launch(x, scale, scale, weight, 1e-6, 1.0, 1.0, plan, types, **settings)
    elif stem == "rms_norm_add_rms_norm":
        weights = (weight, weight)
        rms_norm_add_rms_norm.launch(x, x, *weights, Scales(), *norm, *norm, **settings)
    else:
        KERNELS[stem].launch(x, x, weight, Scales(), *norm, **settings)


def compile_heads(
    width: int,
    dtype: torch.dtype,
    layout: str,
    target: str,
    tokens: int = 16,
    into: str = "",
    num: int = 16,
    is_joint: bool = False,
    **options: Any,
) -> Any:
    """What Triton makes of `num` q, k and v heads of `width`; q and k turn.

    `into` says where k and v go, if not into memory of their own: "caches" or "copies"; `is_joint`,
    that a norm runs over all heads of a token.
    """
    gpu, recorder = TARGETS[target], _Recorder()
    heads = torch.empty(2, tokens, num, width, dtype=dtype, device="meta").transpose(1, 2)
    shape = (num, 1, width) if is_joint else (width,)
    weight = torch.empty(shape, dtype=dtype, device="meta")
    table = torch.empty(2, 1, tokens, width, dtype=dtype, device="meta")
    plans = [RoundingPlan.once(dtype, dtype)] * 2 + [RoundingPlan.once(dtype, None)]
    turns = [Rotation(layout, width, dtype, dtype)] * 2 + [None]
    norms = ([1e-6] * 3, [1.0] * 3, plans, turns)
    weights = [weight, weight, None]
    told = {"stores": [True] * 3 + [False] * 3, "writes": _writes(heads, into)} if into else {}
    with _building_for(gpu):
        qk_rms_norm_rope.launch([heads] * 3, weights, table, table, *norms, **told, wrap=recorder)
    options["num_warps"] = recorder.num_warps
    return triton.compile(recorder.source, target=gpu, options=options)


def _writes(heads: torch.Tensor, into: str) -> Writes:
    batch, num, _, width = heads.shape
    where: Destination = Repeated((0, 1, 2, 3), 2, 4)
    if into == "caches":
        cache = torch.empty(batch, num, 512, width, dtype=heads.dtype, device="meta")
        first = torch.empty((), dtype=torch.int64, device="meta")
        where = Cached(cache, first, (0, 1, 2, 3), 2, counts_up=True)
    return Writes((None, where, where, None, None, None))


def resources(compiled: Any, path: Path) -> dict[str, int]:
    """Registers of a thread, and bytes that it spills to memory."""
    if "amdgcn" in compiled.asm:
        assembly = compiled.asm["amdgcn"]
        names = ("vgpr_count", "vgpr_spill_count", "sgpr_spill_count", "private_segment_fixed_size")
        found = [int(re.search(rf"\.{name}:\s+(\d+)", assembly).group(1)) for name in names]
        return {"registers": found[0], "spilled": sum(found[1:])}
    path.write_bytes(compiled.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    command = [tool, "--dump-resource-usage", path]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    registers, stack, local = (int(number) for number in found.groups())
    return {"registers": registers, "spilled": stack + local}
