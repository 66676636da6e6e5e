"""How each op is launched for rows of 16-bit types, by width: what was measured to be fastest.

Every entry was chosen among the launches that `benchmarks/launches.py` tries, in bfloat16 on an
NVIDIA H200 with cold caches; the records of the tries are benchmarks/results/launches_h200.json,
launches_weak_h200.json and launches_widths_h200.json. Other GPUs take the same table. Widths
outside it, float32 and float64 take `Launch.by_rule`.
"""

from __future__ import annotations

from typing import NamedTuple

MANY_ROWS = 2048  # from here on the GPU has more rows than it holds at once
MIDDLE_ROWS = 512  # from here on it has several at once in each multiprocessor

MANY_PROGRAMS = 2048  # from here on the GPU has enough of those that take several tiles of heads

# Rows that a program has in registers at once where it is not one: more threads share them.
ROWS_HELD = {
    "rms_norms": 2,
    "gated_rms_norm": 2,
    "dual_rms_norm_add": 2,
    "dual_rms_norm_add_rms_norm": 2,
}


class Entry(NamedTuple):
    """The launch of rows of `narrowest` to `widest` elements; the fields of `tile.Launch`.

    `speedups` is what it gained over Inductor's default code at the width that was measured:
    geometric means over 16, 64 and 512 rows, and over 2048 to 16384. None stands where only a
    related op was measured, or the launch before it (the other two records). These numbers choose,
    and flatter: each is the best of 16 to 60 tries, by the times that chose it. What the kernels
    gain is measured apart, by `normfuse bench`.
    """

    narrowest: int
    widest: int
    rows: int
    block: int
    num_warps: int
    few: str
    middle: str
    many: str
    speedups: tuple[float, float] | None


_HELD = "held"
_AHEAD = "ahead held"
_STREAMED = "ahead held streamed"
_BESIDE = "beside held"
_HALF = "half"
_AGAIN = ""

# fmt: off
_RMS_NORM = (
    Entry(33, 64, 32, 64, 4, _AHEAD, _AHEAD, _HELD, (1.21, 1.20)),
    Entry(65, 128, 16, 128, 4, _HELD, _HELD, _AHEAD, (1.00, 1.01)),
    Entry(129, 256, 4, 256, 4, _HELD, _HELD, _HELD, (1.01, 1.00)),
    Entry(257, 512, 4, 512, 4, _AHEAD, _AHEAD, _AHEAD, (0.98, 1.01)),
    Entry(513, 1024, 1, 256, 1, _AHEAD, _AHEAD, _AHEAD, (0.98, 1.04)),
    Entry(1025, 1536, 1, 512, 4, _STREAMED, _STREAMED, _AHEAD, None),
    Entry(1537, 2048, 1, 1024, 4, _STREAMED, _STREAMED, _AHEAD, (1.16, 1.21)),
    Entry(2049, 2560, 1, 2048, 4, _STREAMED, _STREAMED, _AHEAD, None),
    Entry(2561, 3072, 1, 1024, 8, _STREAMED, _STREAMED, _AHEAD, None),
    Entry(3073, 4096, 1, 4096, 8, _STREAMED, _STREAMED, _AHEAD, (1.13, 1.13)),
    Entry(4097, 6144, 1, 2048, 8, _STREAMED, _AHEAD, _AHEAD, (1.17, 1.09)),
    Entry(6145, 7168, 1, 4096, 8, _STREAMED, _STREAMED, _AHEAD, None),
    Entry(7169, 8192, 1, 8192, 16, _STREAMED, _HELD, _AHEAD, None),
    Entry(8193, 16384, 1, 8192, 32, _STREAMED, _AHEAD, _AHEAD, None),
    Entry(16385, 32768, 1, 8192, 32, _AHEAD, _AHEAD, _HALF, None),
    Entry(32769, 65536, 1, 16384, 32, _HELD, _HELD, _HELD, None),
)
LAUNCHES: dict[str, tuple[Entry, ...]] = {
    "rms_norm": _RMS_NORM,
    "add_rms_norm": (
        Entry(513, 1024, 1, 1024, 4, _STREAMED, _AHEAD, _AHEAD, (1.00, 1.00)),
        Entry(1025, 2048, 1, 2048, 4, _AHEAD, _AHEAD, _HELD, (1.10, 1.08)),
        Entry(2049, 3072, 1, 2048, 4, _AHEAD, _AHEAD, _AHEAD, (1.03, 1.03)),
        Entry(3073, 4096, 1, 4096, 8, _STREAMED, _HELD, _HELD, (1.02, 1.04)),
        Entry(4097, 6144, 1, 2048, 8, _AHEAD, _AHEAD, _HELD, (1.20, 1.05)),
        Entry(6145, 8192, 1, 2048, 8, _STREAMED, _STREAMED, _AHEAD, (1.09, 1.03)),
        Entry(8193, 16384, 1, 4096, 16, _AHEAD, _AHEAD, _AHEAD, (1.48, 1.00)),
        Entry(16385, 32768, 1, 32768, 32, _HELD, _HELD, _HELD, None),
        Entry(32769, 65536, 1, 8192, 32, _HALF, _HALF, _HALF, None),
    ),
    "rms_norm_add": (
        Entry(513, 1024, 1, 1024, 4, _STREAMED, _STREAMED, _AHEAD, (0.88, 1.06)),
        Entry(1025, 2048, 1, 2048, 4, _STREAMED, _AHEAD, _AHEAD, (1.16, 1.09)),
        Entry(2049, 3072, 1, 1024, 4, _STREAMED, _AHEAD, _AHEAD, (1.26, 1.21)),
        Entry(3073, 4096, 1, 2048, 8, _STREAMED, _AHEAD, _AHEAD, (1.19, 1.14)),
        Entry(4097, 6144, 1, 8192, 8, _STREAMED, _AHEAD, _AHEAD, (1.27, 1.12)),
        Entry(6145, 8192, 1, 8192, 16, _STREAMED, _HELD, _HELD, (1.22, 1.02)),
        Entry(8193, 16384, 1, 8192, 16, _STREAMED, _HELD, _HELD, None),
    ),
    "rms_norm_add_rms_norm": (
        Entry(513, 1024, 1, 1024, 4, _STREAMED, _STREAMED, _AHEAD, (1.00, 1.05)),
        Entry(1025, 1152, 1, 256, 2, _STREAMED, _STREAMED, _AHEAD, None),
        Entry(1153, 2048, 1, 2048, 8, _STREAMED, _STREAMED, _AHEAD, (1.48, 1.60)),
        Entry(2049, 2304, 1, 512, 4, _STREAMED, _AHEAD, _AHEAD, None),
        Entry(2305, 3072, 1, 1024, 4, _STREAMED, _AHEAD, _AHEAD, (1.27, 1.22)),
        Entry(3073, 4096, 1, 4096, 8, _STREAMED, _STREAMED, _HELD, (1.28, 1.08)),
        Entry(4097, 5120, 1, 1024, 8, _STREAMED, _STREAMED, _AHEAD, None),
        Entry(5121, 6144, 1, 8192, 8, _AHEAD, _HELD, _BESIDE, None),
        Entry(6145, 8192, 1, 8192, 16, _STREAMED, _STREAMED, _HELD, (1.24, 1.02)),
        Entry(8193, 16384, 1, 16384, 16, _AHEAD, _HELD, _HELD, None),
        Entry(16385, 32768, 1, 32768, 32, _HELD, _HELD, _HELD, None),
        Entry(32769, 65536, 1, 8192, 32, _HALF, _HALF, _AGAIN, None),
    ),
    "dual_rms_norm_add": (
        Entry(513, 1024, 1, 1024, 4, _STREAMED, _AHEAD, _STREAMED, (1.01, 0.98)),
        Entry(1025, 2048, 1, 2048, 8, _STREAMED, _AHEAD, _STREAMED, (1.64, 1.59)),
        Entry(2049, 3072, 1, 4096, 4, _STREAMED, _AHEAD, _HELD, None),
        Entry(3073, 4096, 1, 4096, 8, _STREAMED, _HELD, _HELD, (1.47, 1.49)),
        Entry(4097, 6144, 1, 8192, 8, _AHEAD, _AHEAD, _HELD, (1.64, 1.56)),
        Entry(6145, 8192, 1, 4096, 16, _AHEAD, _HELD, _BESIDE, None),
        Entry(8193, 16384, 1, 8192, 16, _STREAMED, _AHEAD, _HELD, (2.06, 2.39)),
    ),
    "dual_rms_norm_add_rms_norm": (
        Entry(513, 1024, 1, 1024, 4, _STREAMED, _AHEAD, _STREAMED, None),
        Entry(1025, 2048, 1, 2048, 8, _STREAMED, _AHEAD, _STREAMED, None),
        Entry(2049, 3072, 1, 1024, 4, _STREAMED, _AHEAD, _HELD, (2.09, 1.62)),
        Entry(3073, 4096, 1, 1024, 4, _STREAMED, _AHEAD, _AHEAD, (1.84, 1.47)),
        Entry(4097, 6144, 1, 2048, 8, _STREAMED, _AHEAD, _HELD, (2.01, 1.49)),
        Entry(6145, 8192, 1, 2048, 8, _STREAMED, _AHEAD, _HELD, None),
        Entry(8193, 16384, 1, 8192, 16, _STREAMED, _AHEAD, _HELD, None),
    ),
    "rms_norms": (
        Entry(513, 2048, 1, 1024, 4, _STREAMED, _STREAMED, _STREAMED, None),
        Entry(2049, 3072, 1, 1024, 4, _STREAMED, _STREAMED, _STREAMED, (1.17, 1.24)),
        Entry(3073, 4096, 1, 2048, 4, _AHEAD, _STREAMED, _AHEAD, (1.16, 1.03)),
        Entry(4097, 6144, 1, 2048, 8, _AHEAD, _AHEAD, _STREAMED, (1.11, 0.94)),
        Entry(6145, 8192, 1, 4096, 16, _STREAMED, _HELD, _HELD, None),
        Entry(8193, 16384, 1, 4096, 16, _STREAMED, _HELD, _HELD, None),
    ),
    "gated_rms_norm": (
        Entry(65, 128, 8, 128, 4, _AHEAD, _AHEAD, _AHEAD, (1.22, 1.08)),
        Entry(129, 256, 8, 256, 8, _AHEAD, _AHEAD, _HELD, (1.14, 1.01)),
        Entry(513, 2048, 1, 2048, 4, _AHEAD, _AHEAD, _HELD, None),
        Entry(2049, 4096, 1, 4096, 16, _AHEAD, _AHEAD, _AHEAD, None),
        Entry(4097, 8192, 1, 2048, 8, _AHEAD, _HELD, _HELD, None),
        Entry(8193, 16384, 1, 4096, 16, _HELD, _HELD, _HELD, None),
    ),
    "modulated_rms_norm": (
        Entry(513, 1536, 1, 512, 4, _AHEAD, _AHEAD, _AHEAD, None),
        Entry(1537, 2048, 1, 2048, 4, _AHEAD, _AHEAD, _AHEAD, (1.11, 1.14)),
        Entry(2049, 4096, 1, 2048, 8, _AHEAD, _AHEAD, _HELD, (1.05, 1.16)),
        Entry(4097, 8192, 1, 2048, 8, _AHEAD, _AHEAD, _HELD, None),
        Entry(8193, 16384, 1, 4096, 16, _HELD, _HELD, _HELD, None),
    ),
}

# Rows that begin anywhere, so that each element is a load of its own. Up to 1024 columns, of the
# launches within 0.5 % of the fastest in the mean of launches_odd_h200.json, those that are fastest
# for few rows. At 5377 what reads ahead is 1.27x as fast for 512 rows (kernels_h200.json).
ODD_LAUNCHES: dict[str, tuple[Entry, ...]] = {
    "rms_norm": (Entry(513, 1024, 1, 256, 2, _AHEAD, _AHEAD, _AHEAD, None),),
    "add_rms_norm": (Entry(513, 1024, 1, 256, 8, _AHEAD, _AHEAD, _AHEAD, None),),
    "rms_norm_add_rms_norm": (
        Entry(513, 1024, 1, 256, 8, _AHEAD, _AHEAD, _AHEAD, None),
        Entry(5121, 6144, 1, 8192, 8, _AHEAD, _AHEAD, _BESIDE, None),
    ),
}
# fmt: on

# Heads that stand side by side, by the width of their tile: elements of a tile, warps of a program,
# and tiles that it takes at most. Chosen in launches_heads_h200.json among 20 each, over 1 to 16384
# tokens of models with such heads; in brackets what they gained there over the launches before, up
# to 64 tokens and from 4096 on.
HEADS = {
    64: (512, 1, 4),  # not measured
    128: (512, 1, 4),  # (1.06, 1.06)
    256: (512, 2, 4),  # (1.16, 1.03)
    512: (1024, 2, 4),  # (1.00, 1.01)
}

# Heads that share a norm, by the width of the tile that holds all of them: warps of a program. More
# wait longer for each other (joint_heads_h200.json); 16384 columns were not measured.
JOINT_HEADS = {2048: 4, 4096: 4, 8192: 4, 16384: 8}
