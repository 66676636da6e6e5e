"""Which cells `launches.py` measures, and which launches it tries in each: four presets."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import NamedTuple

from normfuse.cli.bench.cells import QK, Cell
from normfuse.ops.kernels.launches import LAUNCHES

ROWS = (16, 64, 512, 4096, 16384)
WIDTHS = (1024, 2048, 2816, 4096, 5376, 8192, 16384)
SHORT = (64, 128, 256, 512)  # heads
HEADS = {"l2_norm": (16,), "gated_rms_norm": (32,)}  # of a token, where rows are short
SANDWICH, DUAL = "rms_norm_add_rms_norm", "dual_rms_norm_add"
OPS = (
    "rms_norm",
    "add_rms_norm",
    "rms_norm_add",
    SANDWICH,
    DUAL,
    "dual_rms_norm_add_rms_norm",
    "rms_norms",
    "modulated_rms_norm",
    *HEADS,
    "qk_rms_norm_rope",
)
WITH_RESIDUAL = ("rms_norm_add", SANDWICH, DUAL, "dual_rms_norm_add_rms_norm")
READS = ("held", "ahead held", "ahead held streamed")


class Candidate(NamedTuple):
    """The fields of `tile.Launch`, one way to read instead of two.

    Of q and k, `rows` is the tiles that a program takes, `block` the elements of a tile.
    """

    rows: int
    block: int
    num_warps: int
    reads: str

    @property
    def order(self) -> tuple[int, ...]:
        """What decides in which order a row is summed: the same for few rows and for many."""
        return (self.rows, self.block, self.num_warps)


Plan = list[tuple[Cell, list[Candidate]]]


def whole(ops: list[str], widths: list[int] | None) -> Plan:
    """Every op at every width that the table has, and the launches that it was chosen from."""
    plan = []
    for op, rows in product([op for op in ops if op not in QK], ROWS):
        for width in widths or (SHORT if op in HEADS else WIDTHS):
            cell = Cell(op, rows, width, heads=HEADS.get(op, (1,)))
            plan.append((cell, list(_ordinary(width))))
    return plan


def _ordinary(width: int) -> Iterator[Candidate]:
    block = 1 << (width - 1).bit_length()
    if width <= 512:
        for elements, share, reads in product((512, 1024, 2048, 4096), (8, 16, 32), READS[:2]):
            if elements >= block and elements >= share * 32:
                yield Candidate(elements // block, block, elements // share // 32, reads)
        return
    for warps in (1, 2, 4, 8, 16, 32):
        if not 8 <= block // (32 * warps) <= 64:
            continue
        blocks = {min(block, warps * share) for share in (256, 512, 1024)}
        for tile, reads in product(sorted(blocks), READS):
            yield Candidate(1, tile, warps, reads)


# Cells in which we lost, or stayed below what was asked for, before launches_widths_h200.json was
# made of them, and as many rows as share their entry of the table.
WEAK = (
    *((op, 65536, (64, 4096)) for op in ("rms_norm", "add_rms_norm", SANDWICH)),
    ("rms_norm", 7168, (64, 512, 4096, 16384, 65536)),
    ("rms_norm", 8192, (64, 512, 4096, 16384, 65536)),
    ("rms_norm", 1152, (64, 512, 2048, 16384, 65536)),
    *((op, 16384, (64, 512, 4096)) for op in ("rms_norm", SANDWICH)),
    *(("modulated_rms_norm", width, (1, 64, 512, 4096, 16384)) for width in (1536, 3584)),
    ("rms_norms", 8192, (1, 512, 4096, 16384)),
    *((SANDWICH, width, (64, 512, 4096, 16384)) for width in (1152, 5120, 7168)),
    ("add_rms_norm", 1024, (8, 512, 2048, 16384)),
    ("gated_rms_norm", 4096, (1, 64, 4096)),
    *((op, 769, (32, 4096, 65536)) for op in ("rms_norm", "add_rms_norm", SANDWICH)),
)
WEAK_HEADS = (((32, 8), 128), ((32, 16), 128), ((16, 8), 256), ((8, 4), 256), ((8, 4), 512))


def weak(ops: list[str], widths: list[int] | None) -> Plan:
    """Only cells in which something is to be won, with launches that were not tried before too."""
    plan = []
    for op, width, some_rows in WEAK:
        tried = list(dict.fromkeys(_unusual(op, width)))
        plan += [(Cell(op, rows, width), tried) for rows in some_rows]
    for (heads, width), rows in product(WEAK_HEADS, (1, 64, 512, 4096, 16384)):
        plan.append((Cell("qk_rms_norm_rope", rows, width, heads), list(_heads(width))))
    return [
        (cell, tried)
        for cell, tried in plan
        if cell.op in ops and cell.width in (widths or [cell.width])
    ]


def _heads(width: int) -> Iterator[Candidate]:
    """8 to 32 elements of a tile for each lane, and 64 of all tiles of a program at most."""
    for groups, block, warps in product((1, 2, 4), (512, 1024, 2048), (1, 2, 4)):
        share = block // (32 * warps)
        if block >= width and share >= 8 and share * groups <= 64:
            yield Candidate(groups, block, warps, "")


def _unusual(op: str, width: int) -> Iterator[Candidate]:
    if width > 16384:
        yield from _wide(op)
    elif width % 8:  # no vector divides it: every element is a load of its own
        for block, warps in product((256, 512, 1024), (1, 2, 4, 8)):
            for rows in (1, 2, 4, 8):  # one load of a weight serves them all
                if block >= 32 * warps and rows * 1024 // (32 * warps) <= 64:
                    yield from (Candidate(rows, block, warps, reads) for reads in READS[:2])
    else:
        yield from _common(op, width)


def _wide(op: str) -> Iterator[Candidate]:
    """Half of a row in registers, or what does not fit read again with more rows on their way."""
    for block, warps in ((8192, 32), (16384, 32), (8192, 16)):
        yield Candidate(1, block, warps, "half")
    if op == "rms_norm":  # nothing beside the row has to be held
        yield from (Candidate(1, block, 32, "held") for block in (8192, 16384, 65536))
    for block, warps in ((8192, 32), (8192, 16), (4096, 16), (4096, 8), (2048, 8)):
        yield Candidate(1, block, warps, "")


def _common(op: str, width: int) -> Iterator[Candidate]:
    """Half a vector of a row for each lane, or one, two or four; of 4 to 64 elements in all."""
    block = 1 << (width - 1).bit_length()
    ways = (*READS, "beside held") if op in WITH_RESIDUAL else READS
    for warps in (1, 2, 4, 8, 16, 32):
        if 4 <= width / (32 * warps) <= 64:
            tiles = {min(block, warps * share) for share in (128, 256, 512, 1024)}
            yield from (Candidate(1, *one) for one in product(sorted(tiles), (warps,), ways))


# Widths of models between those of `WIDTHS`: Gemma 3 1B, Qwen2 1.5B, Gemma 2 2B, Gemma 3 4B,
# gpt-oss, Llama 3.2 3B, Gemma 2 9B, Gemma 3 12B, Qwen3 32B, Mixtral 8x22B, DeepSeek V3.
BETWEEN = (1152, 1536, 2304, 2560, 2880, 3072, 3584, 3840, 5120, 6144, 7168)
MIDDLE = (256, 512, 1024)  # rows that the GPU may hold all at once, or not


def between(ops: list[str], widths: list[int] | None) -> Plan:
    """The most usual ops at the other widths of models, with the launches that won elsewhere."""
    most_usual = [op for op in ("rms_norm", "add_rms_norm", SANDWICH) if op in ops]
    return [
        (Cell(op, rows, width), list(_likely(op, rows, width)))
        for op, width, rows in product(most_usual, widths or BETWEEN, (64, 512, 4096, 16384))
    ]


def _likely(op: str, rows: int, width: int) -> Iterator[Candidate]:
    """8 to 48 elements of a row for each lane, and half a vector of a tile, a whole one or two."""
    block = 1 << (width - 1).bit_length()
    for warps in (1, 2, 4, 8, 16, 32):
        if 8 <= width / (32 * warps) <= 48:
            tiles = {min(block, warps * share) for share in (128, 256, 512)}
            yield from (
                Candidate(1, *one) for one in product(sorted(tiles), (warps,), _ways(op, rows))
            )


def reads(ops: list[str], widths: list[int] | None) -> Plan:
    """A middling number of rows, read in every way, in the order of summing that the table has."""
    return [
        (Cell(op, rows, entry.widest), [Candidate(*entry[2:5], way) for way in _ways(op, rows)])
        for op in ops
        for entry in LAUNCHES.get(op, ())
        for rows in MIDDLE
        if 1024 <= entry.widest <= 16384 and entry.widest in (widths or [entry.widest])
    ]


def _ways(op: str, rows: int) -> tuple[str, ...]:
    """How rows may be read, but for what never won with so many of them."""
    if rows <= 128:
        return READS[1:]
    if rows <= 2048:
        return READS
    return (*READS[:2], "beside held") if op in WITH_RESIDUAL else READS[:2]


PRESETS = {"whole": whole, "weak": weak, "between": between, "reads": reads}
