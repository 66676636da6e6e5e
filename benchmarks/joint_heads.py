"""Norms over all heads of a token and RoPE in one launch, or in two: by tokens and warps.

    python benchmarks/joint_heads.py --out benchmarks/results/joint_heads_h200.json

It chose the launches of `JOINT_HEADS` in normfuse/ops/kernels/launches.py. "apart" is a launch of
`qk_rms_norm` on whole projections and one of `rope`; "copy" reads and writes the same bytes. Cold
caches, CUDA graphs replayed in turn, medians in microseconds; each result is compared with that of
the reference first.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.progress import track

from normfuse.cli.bench.record import command_of, environment
from normfuse.ops.kernels import qk_rms_norm, qk_rms_norm_rope, rope
from normfuse.ops.kernels.slots import HeadsLaunch
from normfuse.ops.qk_rms_norm_rope import qk_rms_norm_rope_reference
from normfuse.ops.rotation import Rotation
from normfuse.ops.rounding import RoundingPlan
from normfuse.passes.measure import CACHES, MAX_SETS, cold_times

DIM = 128
HEADS = {"OLMo 2 7B": (32, 32), "OLMo 2 32B": (40, 8), "MiniMax M2": (48, 8), "OLMoE": (16, 16)}
TOKENS = (1, 16, 64, 512, 4096, 16384)
WARPS = (2, 4, 8, 16)

Operands = list[torch.Tensor]


def forms_of(counts: tuple[int, int], tokens: int) -> dict[str, Callable[[Operands], Any]]:
    """Functions of q and k (1, tokens, heads * DIM), by name; "reference" is what they compute."""
    bf16 = torch.bfloat16
    plan, turn = RoundingPlan.once(bf16, bf16), Rotation("half", DIM, bf16, bf16)
    weights = [torch.randn(num, 1, DIM, device="cuda", dtype=bf16) for num in counts]
    tables = [torch.randn(1, 1, tokens, DIM, device="cuda") for _ in range(2)]
    numbers, stores = ([1e-6] * 2, [0.0] * 2), [True, True, False, False]

    def heads(xs: Operands) -> Operands:
        pairs = zip(xs, counts, strict=True)
        return [x.view(1, tokens, num, DIM).transpose(1, 2) for x, num in pairs]

    def apart(xs: Operands) -> Any:
        vectors = [weight.flatten() for weight in weights]
        normed = qk_rms_norm.launch(xs, vectors, *numbers, [plan] * 2, stores=stores)
        return rope.launch(heads([y for y in normed if y is not None]), *tables, [turn] * 2)

    def joint(warps: int | None) -> Callable[[Operands], Any]:
        width = 1 << (max(counts) - 1).bit_length()
        tile = None if warps is None else HeadsLaunch(width * DIM, warps)
        norms = (*numbers, [plan] * 2, [turn] * 2)
        return lambda xs: qk_rms_norm_rope.launch(
            heads(xs), weights, *tables, *norms, stores=stores, tile=tile
        )

    def reference(xs: Operands) -> Any:
        words = ([str(plan)] * 2, [str(turn)] * 2)
        return qk_rms_norm_rope_reference(heads(xs), weights, *tables, *numbers, *words)

    by_warps = {f"{warps} warps": joint(warps) for warps in WARPS}
    copy = {"copy": lambda xs: [x.clone() for x in xs]}
    return {"reference": reference, "ships": joint(None), "apart": apart, **copy, **by_warps}


def measured(counts: tuple[int, int], tokens: int) -> dict[str, float]:
    """Microseconds of each form."""
    size = tokens * sum(counts) * DIM * 2
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    num_sets = min(max(2, -(-CACHES * cache // size)), MAX_SETS // 2)
    shapes = [(1, tokens, num * DIM) for num in counts]
    make = {"device": "cuda", "dtype": torch.bfloat16}
    sets = [[torch.randn(shape, **make) for shape in shapes] for _ in range(num_sets)]
    forms = forms_of(counts, tokens)
    expected = forms.pop("reference")(sets[0])[:2]
    for name, form in forms.items():
        if name != "copy":
            for result, right in zip(form(sets[0]), expected, strict=False):
                torch.testing.assert_close(result, right, rtol=2**-6, atol=2**-6, msg=name)
    times = cold_times(list(forms.values()), sets)
    return {name: round(time, 2) for name, time in zip(forms, times, strict=True)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="where to write the record; by default nowhere")
    arguments = parser.parse_args()
    cells = [(model, counts, tokens) for model, counts in HEADS.items() for tokens in TOKENS]
    rows = []
    for model, counts, tokens in track(cells, "joint norms"):
        times = measured(counts, tokens)
        rows.append({"model": model, "heads": counts, "tokens": tokens, "us": times})
        print(json.dumps(rows[-1]), flush=True)
        torch.cuda.empty_cache()
    if arguments.out is not None:
        record = {
            **environment(command_of("benchmarks/joint_heads.py", None)),
            "heads_of": DIM,
            "dtype": "bf16",
            "rows": rows,
        }
        arguments.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
