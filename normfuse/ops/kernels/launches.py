"""How each op is launched for rows of 16-bit types, by width: what was measured to be fastest.

Every entry was chosen among the launches that `benchmarks/launches.py` tries, in bfloat16 on an
NVIDIA H200 with cold caches; the record of each try is benchmarks/results/launches_h200.json. Other
GPUs take the same table. Widths outside it, float32 and float64 take `Launch.by_rule`.
"""

from __future__ import annotations

from typing import NamedTuple

MANY_ROWS = 2048  # from here on the GPU has more rows than it holds at once

# Rows that a program has in registers at once where it is not one: more threads share them.
ROWS_HELD = {
    "rms_norms": 2,
    "gated_rms_norm": 2,
    "dual_rms_norm_add": 2,
    "dual_rms_norm_add_rms_norm": 2,
}


class Entry(NamedTuple):
    """The launch of rows of `narrowest` to `widest` elements; the fields of `tile.Launch`.

    `few_speedup` and `many_speedup` are what it gained over Inductor's default code at the width
    that was measured: geometric means over 16, 64 and 512 rows, and over 2048 to 16384.
    """

    narrowest: int
    widest: int
    rows: int
    block: int
    num_warps: int
    few: str
    many: str
    few_speedup: float
    many_speedup: float


_AHEAD = "ahead held"
_SMALL = "ahead held streamed"

# fmt: off
LAUNCHES: dict[str, tuple[Entry, ...]] = {
    "rms_norm": (
        Entry(513, 1024, 1, 256, 1, _AHEAD, _AHEAD, 0.98, 1.04),
        Entry(1025, 2048, 1, 1024, 4, _SMALL, _AHEAD, 1.16, 1.21),
        Entry(2049, 3072, 1, 2048, 4, _AHEAD, _AHEAD, 1.15, 1.34),
        Entry(3073, 4096, 1, 4096, 8, _SMALL, _AHEAD, 1.13, 1.13),
        Entry(4097, 6144, 1, 2048, 8, _SMALL, _AHEAD, 1.17, 1.09),
        Entry(6145, 8192, 1, 2048, 8, _SMALL, _AHEAD, 1.23, 0.99),
        Entry(8193, 16384, 1, 4096, 8, _SMALL, _AHEAD, 1.51, 1.00),
    ),
    "add_rms_norm": (
        Entry(513, 1024, 1, 1024, 4, _SMALL, _AHEAD, 1.00, 1.00),
        Entry(1025, 2048, 1, 2048, 4, _AHEAD, "held", 1.10, 1.08),
        Entry(2049, 3072, 1, 2048, 4, _AHEAD, _AHEAD, 1.03, 1.03),
        Entry(3073, 4096, 1, 4096, 8, _SMALL, "held", 1.02, 1.04),
        Entry(4097, 6144, 1, 2048, 8, _AHEAD, "held", 1.20, 1.05),
        Entry(6145, 8192, 1, 2048, 8, _SMALL, _AHEAD, 1.09, 1.03),
        Entry(8193, 16384, 1, 4096, 16, _AHEAD, _AHEAD, 1.48, 1.00),
    ),
    "rms_norm_add_rms_norm": (
        Entry(513, 1024, 1, 1024, 4, _SMALL, _AHEAD, 1.00, 1.05),
        Entry(1025, 2048, 1, 2048, 8, _SMALL, _AHEAD, 1.48, 1.60),
        Entry(2049, 3072, 1, 1024, 4, _SMALL, _AHEAD, 1.27, 1.22),
        Entry(3073, 4096, 1, 4096, 8, _SMALL, "held", 1.28, 1.08),
        Entry(4097, 6144, 1, 4096, 8, _SMALL, "held", 1.19, 1.08),
        Entry(6145, 8192, 1, 8192, 16, _SMALL, "held", 1.24, 1.02),
        Entry(8193, 16384, 1, 8192, 16, _SMALL, "held", 1.72, 1.01),
    ),
    "dual_rms_norm_add": (
        Entry(513, 1024, 1, 1024, 4, _SMALL, _SMALL, 1.01, 0.98),
        Entry(1025, 2048, 1, 2048, 8, _SMALL, _SMALL, 1.64, 1.59),
        Entry(2049, 3072, 1, 1024, 4, _SMALL, _AHEAD, 1.46, 1.50),
        Entry(3073, 4096, 1, 4096, 8, _SMALL, "held", 1.47, 1.49),
        Entry(4097, 6144, 1, 8192, 8, _AHEAD, "held", 1.64, 1.56),
        Entry(6145, 8192, 1, 2048, 8, _SMALL, "held", 1.57, 1.55),
        Entry(8193, 16384, 1, 8192, 16, _SMALL, "held", 2.06, 2.39),
    ),
}
# fmt: on
LAUNCHES["rms_norm_add"] = LAUNCHES["rms_norm_add_rms_norm"]
LAUNCHES["dual_rms_norm_add_rms_norm"] = LAUNCHES["dual_rms_norm_add"]
LAUNCHES["modulated_rms_norm"] = LAUNCHES["add_rms_norm"]
LAUNCHES["gated_rms_norm"] = LAUNCHES["add_rms_norm"]
LAUNCHES["rms_norms"] = LAUNCHES["rms_norm"]

# Heads that stand side by side, by the width of their tile: (elements, warps) of a program.
HEADS = {
    64: (1024, 4),  # not measured
    128: (1024, 4),  # 32 + 8 heads: 88 % of the memory limit from 4096 tokens on
    256: (2048, 4),  # 16 + 8 heads: 90 %
    512: (1024, 2),  # 8 + 2 heads: 87 to 90 %
}
