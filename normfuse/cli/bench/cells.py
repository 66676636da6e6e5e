"""What is measured: one op at one shape and type, and the order in which cells are taken.

The grid is larger than one sitting. Cells come in tiers, the most informative first, and inside a
tier every op has its turn, so that a run that ends early has seen something of all of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import product, zip_longest
from typing import Any

OPS = (
    "rms_norm",
    "add_rms_norm",
    "rms_norm_add",
    "rms_norm_add_rms_norm",
    "dual_rms_norm_add",
    "dual_rms_norm_add_rms_norm",
    "rms_norms",
    "l2_norm",
    "gated_rms_norm",
    "modulated_rms_norm",
    "qk_rms_norm",
    "qk_rms_norm_rope",
    "rope",
)
# These three have the whole grid of rows and widths; what they show holds for their relatives.
WHOLE = ("rms_norm", "add_rms_norm", "rms_norm_add_rms_norm")
QK = ("qk_rms_norm", "qk_rms_norm_rope")

ROWS = (1, 8, 32, 64, 512, 2048, 4096, 16384, 65536)
# Qwen3 0.6B, Gemma 3 1B, Qwen3 1.7B, Gemma 2 2B, Gemma 3 4B, Gemma 4 26B-A4B, gpt-oss, Gemma 2 9B,
# Llama 3 8B, Qwen3 14B, Gemma 3 27B, DeepSeek V3, Llama 3 70B; and widths that no vector divides.
WIDTHS = (1024, 1152, 2048, 2304, 2560, 2816, 2880, 3584, 4096, 5120, 5376, 7168, 8192, 16384)
ODD_WIDTHS = (769, 5377)
WIDE = (32768, 65536)
FEW_ROWS = (1, 64, 512, 4096, 16384)
FEW_WIDTHS = (2816, 4096, 5376, 8192)

# Heads of q and of k, and their width.
MODELS = {
    "Qwen3-8B": (32, 8, 128),
    "Qwen3-30B-A3B": (32, 4, 128),
    "Gemma-3-12B": (16, 8, 256),
    "Gemma-3-27B": (32, 16, 128),
    "Gemma-4 local": (8, 4, 256),
    "Gemma-4 global": (8, 4, 512),
}
# The same of models that turn them without a norm.
TURNED = {"Llama-3-8B": (32, 8, 128), "GLM-4-9B": (32, 2, 128), "OLMo-2-7B": (32, 32, 128)}


@dataclass(frozen=True)
class Cell:
    """One op at one shape and type.

    Attributes:
        op: a name in `OPS`.
        rows: tokens; an op on heads has `rows * sum(heads)` rows of `width`.
        width: of the normalised axis.
        heads: how many rows of each operand belong to a token, q and k apart; (1,) for none.
        dtype: "bf16", "fp16" or "fp32", of activations and weights.
        tier: 0 for `--quick`; the smaller, the earlier.
    """

    op: str
    rows: int
    width: int
    heads: tuple[int, ...] = (1,)
    dtype: str = "bf16"
    tier: int = 3

    @property
    def name(self) -> str:
        """`add_rms_norm 4096 x 5376 bf16`, `qk_rms_norm 64 x (32+8) x 128 bf16`."""
        heads = "+".join(map(str, self.heads))
        between = "" if self.heads == (1,) else f" x ({heads})" if "+" in heads else f" x {heads}"
        return f"{self.op} {self.rows}{between} x {self.width} {self.dtype}"

    @property
    def regime(self) -> str:
        """ "decode" up to 64 rows, "middle" up to 2048, "prefill" beyond."""
        return "decode" if self.rows <= 64 else "middle" if self.rows <= 2048 else "prefill"

    @property
    def is_autotuned(self) -> bool:
        """Whether Inductor's max-autotune competes: it takes seconds to compile each cell."""
        return self.tier == 0 or (self.tier == 1 and self.rows == 4096 and self.op in WHOLE)

    def to_json(self) -> dict[str, Any]:
        """The cell as a part of its record."""
        return {**asdict(self), "heads": list(self.heads), "regime": self.regime, "name": self.name}

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Cell:
        """The cell of such a record."""
        heads = tuple(record["heads"])
        names = ("op", "rows", "width", "dtype", "tier")
        return cls(**{name: record[name] for name in names}, heads=heads)


def grid(ops: Iterable[str] = OPS, *, quick: bool = False) -> list[Cell]:
    """All cells of these ops in the order in which they are measured; `quick` is tier 0 alone."""
    by_op = [_without_repeats(_cells_of(op)) for op in OPS if op in set(ops)]
    last = 0 if quick else 3
    return [
        cell
        for tier in range(last + 1)
        for turn in zip_longest(*([cell for cell in cells if cell.tier == tier] for cells in by_op))
        for cell in turn
        if cell is not None
    ]


def _cells_of(op: str) -> Iterator[Cell]:
    if op in QK:
        yield from _heads_of_models(op)
    elif op == "rope":
        for (heads_q, heads_k, width), rows in product(TURNED.values(), FEW_ROWS):
            tier = 0 if heads_k == 8 and rows in (1, 512, 4096) else 1
            yield Cell(op, rows, width, (heads_q, heads_k), tier=tier)
    elif op in ("l2_norm", "gated_rms_norm"):  # Qwen3-Next: 16 heads of keys, 32 of values
        heads = (16,) if op == "l2_norm" else (32,)
        yield from (Cell(op, rows, 128, heads, tier=0) for rows in (1, 512, 4096))
        yield from (Cell(op, rows, 128, heads, tier=1) for rows in FEW_ROWS)
        if op == "gated_rms_norm":  # and as wide as a model
            yield from (Cell(op, rows, 4096, tier=1) for rows in FEW_ROWS)
    elif op == "modulated_rms_norm":
        yield from (Cell(op, rows, 3584, tier=0) for rows in (64, 4096))
        yield from (Cell(op, rows, width, tier=1) for rows in FEW_ROWS for width in (1536, 3584))
    else:
        yield from _rows_by_widths(op)


def _heads_of_models(op: str) -> Iterator[Cell]:
    cells = [
        Cell(op, rows, width, (heads_q, heads_k), tier=1 if op.endswith("rope") else 2)
        for (heads_q, heads_k, width), rows in product(MODELS.values(), FEW_ROWS)
    ]
    quick: dict[tuple[int, ...], tuple[int, ...]] = {
        (32, 8, 128): (1, 512, 4096),
        (16, 8, 256): (64, 4096),
    }
    for cell in cells:
        is_quick = cell.rows in quick.get((*cell.heads, cell.width), ())
        yield replace(cell, tier=0) if is_quick and op.endswith("rope") else cell
    if op == "qk_rms_norm":
        yield from (Cell(op, rows, 128, (32, 8), tier=0) for rows in (1, 4096))


def _rows_by_widths(op: str) -> Iterator[Cell]:
    is_gemma_4 = op.startswith("dual") or op == "rms_norms"
    main = 2816 if is_gemma_4 else 5376
    yield from (Cell(op, rows, main, tier=0) for rows in (1, 512, 4096))
    few = FEW_WIDTHS if op in WHOLE else (2816, 5376)
    yield from (Cell(op, rows, width, tier=1) for width, rows in product(few, FEW_ROWS))
    if op not in WHOLE:
        yield from (Cell(op, rows, width) for width, rows in product(FEW_WIDTHS, FEW_ROWS))
        return
    yield from (Cell(op, rows, 4096, dtype="fp16", tier=2) for rows in (64, 4096))
    yield from (Cell(op, rows, 4096, dtype="fp32", tier=2) for rows in (64, 4096))
    yield from (Cell(op, rows, width, tier=2) for width in WIDE for rows in (64, 4096))
    widths = (*WIDTHS, *ODD_WIDTHS)
    yield from (Cell(op, rows, width, tier=2) for rows in (32, 4096) for width in widths)
    yield from (Cell(op, rows, width) for rows, width in product(ROWS, widths))


def _without_repeats(cells: Iterable[Cell]) -> list[Cell]:
    """The cells, each once, in its first tier of all those that it is listed in."""
    first: dict[Cell, Cell] = {}
    for cell in cells:
        key = replace(cell, tier=0)
        if key not in first or cell.tier < first[key].tier:
            first[key] = cell
    return list(first.values())
