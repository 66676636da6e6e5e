"""Random programs around RMSNorm: spellings, types, shapes, strides, chains, writes, near misses.

Where a choice has an `odd` half, a plain program draws from the first half alone, all of which
must be recognised.
"""

from __future__ import annotations

from hypothesis import strategies as st

from tests.fuzz.norms import norm, viewed
from tests.fuzz.operands import DTYPES, activation, disturb
from tests.fuzz.program import Program, Writer

WIDTHS = (8, 7, 16, 33, 2)


@st.composite
def programs(draw, plain=False):
    """One to three norms, with what models put around them."""
    write = Writer(draw, plain=plain)
    shape = _shape(write)
    x = activation(write, "x", shape)
    results = []
    for _ in range(draw(st.integers(1, 3))):
        x = _before(write, x, results)
        y = norm(write, x)
        if write.chance(20, plain=True):
            results.append(norm(write, x))  # another norm of the same value
        disturb(write)
        x = _after(write, y, x, results)
    disturb(write)
    return _finish(write, [x, *results])


@st.composite
def heads(draw, plain=False):
    """The norms of queries and keys out of one projection, then rotary embedding."""
    write = Writer(draw, plain=plain)
    width, num_heads = write.pick(8, 16, 2), write.pick(2, 1, 3)
    dtype = write.pick(*DTYPES[:3])
    packed_width = 3 * num_heads * width
    packed = write.input("packed", f"torch.randn(2, 3, {packed_width}).to({dtype})")
    cos = write.input("cos", f"torch.randn(3, {width}).to({write.pick(dtype, 'torch.float32')})")
    sin = write.input("sin", f"torch.randn(3, {width}).to({write.pick(dtype, 'torch.float32')})")
    is_transposed_first = draw(st.booleans())
    results = []
    for index in range(2):
        end = (index + 1) * num_heads * width
        part = f"{packed}[..., {index * num_heads * width}:{end}]"
        h = write.let("h", f"{part}.{write.pick('view', 'reshape')}(2, 3, {num_heads}, {width})")
        if is_transposed_first:
            h = write.let("h", f"{h}.transpose(1, 2)")
        y = norm(write, h)
        if not is_transposed_first:
            y = write.let("y", f"{y}.transpose(1, 2)")
        disturb(write)
        results.append(_rotated(write, y, cos, sin, width) if write.chance(80, plain=True) else y)
    return _finish(write, results)


def _rotated(write, y, cos, sin, width):
    half = width // 2
    first, second = write.let("a", f"{y}[..., :{half}]"), write.let("b", f"{y}[..., {half}:]")
    rotated = write.let("c", f"torch.cat((-{second}, {first}), dim=-1)")
    return write.let("y", f"{y} * {cos} + {rotated} * {sin}")


def _shape(write):
    rank = write.pick(2, 3, 1, 4)
    return (*(write.pick(2, 3, 1) for _ in range(rank - 1)), write.pick(*WIDTHS, odd=(1,)))


def _finish(write, results) -> Program:
    names = [name for name, value in write.tensors().items() if value.is_floating_point()]
    if write.chance(30):
        results = [*results, *write.draw(st.lists(st.sampled_from(names), max_size=2))]
    if write.chance(20):
        results.append(write.let("extra", f"{write.pick(*names)}.{write.pick('sum()', 'abs()')}"))
    return write.finish(list(dict.fromkeys(results)))


def _before(write, x, results):
    """A sum, a gate or a scale in front of a norm; the sum may be used again."""
    kind = write.pick("nothing", "sum", "scaled sum", odd=("gate", "scale", "cast", "view"))
    if kind == "nothing":
        return x
    if kind == "cast":
        return write.let("x", f"{x}.to({write.pick(*DTYPES)})")
    if kind == "view":
        return viewed(write, x)
    if kind == "gate":
        return write.let("x", f"{x} * {_gate(write, x)}")
    if kind == "scale":
        return write.let("x", f"{x} * {_scale(write)}")
    total = _sum(write, x, is_scaled=kind == "scaled sum")
    if write.chance(50, plain=True):
        results.append(total)
    return total


def _after(write, y, x, results):
    """What a model does with the result of a norm; `x` is what the norm read."""
    kind = write.pick("nothing", "sum", "scaled sum", "gate", "modulate", odd=("view", "x", "cast"))
    if kind in ("sum", "scaled sum"):
        total = _sum(write, y, is_scaled=kind == "scaled sum", close=x)
        if write.chance(30, plain=True):
            results.append(total)
        return total
    if kind == "gate":
        gate = _gate(write, y)
        return write.let("y", write.pick(f"{y} * {gate}", f"{gate} * {y}"))
    if kind == "modulate":
        return write.let("y", f"{y} * (1 + {_residual(write, y)}) + {_residual(write, y)}")
    if kind == "view":
        return viewed(write, y)
    if kind == "x":
        results.append(y)
        return x
    return y if kind == "nothing" else write.let("y", f"{y}.to({write.pick(*DTYPES)})")


def _gate(write, x):
    # Inductor's silu rounds otherwise than eager's: a second one could be neither's.
    is_first = not any("silu" in line for line in write.body)
    function = write.pick(*(("F.silu",) if is_first else ()), "torch.sigmoid")
    return f"{function}({_residual(write, x)}{write.pick('', '.float()')})"


def _residual(write, x):
    value = write.values[x]
    shape = tuple(value.shape)
    known = [
        name
        for name, other in write.tensors().items()
        if tuple(other.shape) == shape and other.is_floating_point()
    ]
    if known and write.chance(25):
        return write.pick(*known)
    return activation(write, "r", shape, write.pick(str(value.dtype), *DTYPES))


def _sum(write, x, *, is_scaled, close=None):
    residual = _residual(write, x)
    if close is not None and write.values[close].shape == write.values[x].shape:
        residual = write.pick(residual, close)
    branch = x
    if is_scaled and write.chance(60, plain=True):
        branch = write.let("b", write.pick(f"{x} * {_scale(write)}", f"{_scale(write)} * {x}"))
    total = write.let(
        "t",
        write.pick(
            f"{residual} + {branch}",
            f"{branch} + {residual}",
            f"torch.add({residual}, {branch})",
            odd=(f"torch.add({residual}, {branch}, alpha=0.5)", f"{residual} - {branch}"),
        ),
    )
    if write.chance(10):
        write.attempt(f"{total} += {_residual(write, total)}")
    if is_scaled and write.chance(40, plain=True):
        if write.chance(30):
            write.attempt(f"{total} *= {_scale(write)}")
        else:
            total = write.let("t", f"{total} * {_scale(write)}")
    return total


def _scale(write):
    number = write.pick("0.22", "2", "-1.5", "1e-3", odd=("tensor", "one", "made", "e", "0"))
    if number in ("tensor", "one"):
        shape = "()" if number == "tensor" else write.pick("(1,)", "(1, 1)")
        return write.input("c", f"torch.full({shape}, 0.7, dtype={write.pick(*DTYPES)})")
    if number == "made":
        return "torch.tensor(0.7)"
    return write.input("e", "0.3") if number == "e" else number


# One thing is wrong, so that no norm is there.
NEAR_MISSES = (
    "centred",
    "mutated",
    "clamped",
    "other root",
    "no square",
    "wrong axis",
    "wrong divisor",
    "eps vector",
    "other value",
    "weight axis",
    "no keepdim",
)


@st.composite
def near_misses(draw, name):
    """A norm that is wrong in the way of that name, and otherwise plain."""
    write = Writer(draw, plain=True)
    shape = (write.pick(3, 2), *(write.pick(2, 3) for _ in range(write.pick(0, 1, 2))))
    width = shape[-1] if name == "no keepdim" else write.pick(8, 7, 33, 2)
    if name == "no keepdim":
        shape = (width,) * len(shape)
    x = activation(write, "x", (*shape, width))
    return _finish(write, [norm(write, x, name)])
