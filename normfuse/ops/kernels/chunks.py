"""A row as a tuple of tiles, (ROWS, BLOCK) each: read, held in registers or read again, stored.

READS says how a program reads its rows, as words of one constant (`tile.Launch.constants`):

    held        a row stays in registers until its results are made of it; else it is read again
    half        its first half does, and the rest is read again
    ahead       what the last step needs (weights, the residual) is asked for before the statistic
    beside      of these, only the residual
    streamed    rows are read once: they leave the caches first
    cuda, hip   the GPU for which `fenced` is written; neither for the interpreter
"""

import triton
import triton.language as tl

from normfuse.ops.kernels.row import widened


@triton.constexpr_function
def says(READS, word):
    """Whether `word` is among the words of READS."""
    return word in READS.split()


@triton.constexpr_function
def num_tiles(N, BLOCK):
    """How many tiles a row of N elements takes."""
    return (N + BLOCK - 1) // BLOCK


@triton.constexpr_function
def num_tiles_read(N, BLOCK, READS, WHEN):
    """How many tiles of a row are read before the first step.

    WHEN says of what: "held" a row, "early" one of two of which only the sum is held, "beside" a
    residual, "ahead" a weight.
    """
    count, words = num_tiles(N, BLOCK), READS.split()
    if WHEN == "held" and "half" in words:
        return count // 2
    if WHEN == "early":
        return count if "held" in words else 0
    if WHEN == "beside":
        return count if "ahead" in words or "beside" in words else 0
    return count if WHEN in words else 0


@triton.jit
def columns(index, BLOCK: tl.constexpr):
    """The columns of one tile, (1, BLOCK)."""
    return index * BLOCK + tl.arange(0, BLOCK)[None, :]


@triton.jit
def row_of(ptr, row, stride):
    """Where each row of a tensor begins; None where there is no tensor.

    A weight, which all rows share, has stride 0: with a pointer for each row, it is read in the
    layout of the rows, and threads need not exchange it.
    """
    if ptr is not None:
        return ptr + row * stride


@triton.jit
def load_tile(ptr, is_row, index, N: tl.constexpr, BLOCK: tl.constexpr, READS: tl.constexpr):
    """One tile in the type that it has in memory, zero outside: it adds nothing to a sum.

    `is_row` is None for a weight, which all rows share.
    """
    cols = columns(index, BLOCK)
    if is_row is None:
        tile = tl.load(ptr + cols, mask=cols < N, other=0.0)
    else:
        POLICY: tl.constexpr = "evict_first" if says(READS, "streamed") else ""
        tile = tl.load(ptr + cols, mask=is_row & (cols < N), other=0.0, eviction_policy=POLICY)
    return tile


@triton.jit
def load_tiles(
    ptr, is_row, N: tl.constexpr, BLOCK: tl.constexpr, READS: tl.constexpr, WHEN: tl.constexpr
):
    """The tiles of a row that are read WHEN READS says; `tile_at` reads the others."""
    tiles = ()
    if ptr is not None:
        for index in tl.static_range(num_tiles_read(N, BLOCK, READS, WHEN)):
            tiles = tiles + (load_tile(ptr, is_row, index, N, BLOCK, READS),)
    return tiles


@triton.jit
def tile_at(
    tiles,
    ptr,
    is_row,
    index,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    READS: tl.constexpr,
    WHEN: tl.constexpr,
):
    """A tile that `load_tiles` holds, or reads now; held in float64 or float32.

    `index` may be a value of the run time where no tile is held.
    """
    if ptr is not None:
        if len(tiles) == 0:
            tile = load_tile(ptr, is_row, index, N, BLOCK, READS)
        elif index < len(tiles):
            tile = tiles[index]
        else:
            tile = load_tile(ptr, is_row, index, N, BLOCK, READS)
        return widened(tile)


@triton.jit
def narrowed(value, TYPE: tl.constexpr):
    """A value that TYPE holds exactly, as few registers as it needs."""
    if TYPE == "bf16":
        value = value.to(tl.bfloat16)
    if TYPE == "f16":
        value = value.to(tl.float16)
    return value


@triton.jit
def fenced(tiles, READS: tl.constexpr):
    """The same tiles, in the compiler's eyes others.

    It would keep the float32 forms of 16-bit tiles between two uses, in twice the registers, to
    save itself the second conversion.
    """
    result = ()
    for index in tl.static_range(len(tiles)):
        result = result + (_fenced(tiles[index], READS),)
    return result


@triton.jit
def _fenced(tile, READS: tl.constexpr):
    if tile.dtype.primitive_bitwidth == 16:
        if says(READS, "cuda"):
            tile = tl.inline_asm_elementwise(
                "mov.b32 $0, $1;", "=r,r", [tile], dtype=tile.dtype, is_pure=True, pack=2
            )
        if says(READS, "hip"):
            tile = tl.inline_asm_elementwise(
                "v_mov_b32 $0, $1", "=v,v", [tile], dtype=tile.dtype, is_pure=True, pack=2
            )
    return tile


@triton.jit
def store_tile(
    ptr,
    value,
    is_row,
    index,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    READS: tl.constexpr,
):
    """Stores a tile where a result is asked for."""
    if ptr is not None:
        cols = columns(index, BLOCK)
        tl.store(ptr + cols, value, mask=is_row & (cols < N))
