"""One random norm: its spelling, its casts, its weight, and what may be wrong with it."""

import torch

from tests.fuzz.operands import DTYPES, disturb, row_weight


def norm(write, x, near_miss=None):
    """Write one norm of `x`; returns its result."""
    if near_miss is None and write.chance(15, plain=True):
        return _functional(write, x)
    casts = (f"{x}.float()", f"{x}.to(torch.float32)", x, f"{x}.double()")
    h = write.let("h", write.pick(*casts, odd=(f"{x}.float().double()", f"{x}.half()")))
    if near_miss == "centred":
        h = write.let("h", f"{h} - {h}.mean(-1, keepdim=True)")
    if near_miss == "mutated":
        h = write.let("h", f"{h} * 1.5")
    root, divides = _inverse_root(write, h, near_miss)
    if near_miss == "mutated":
        write.do(f"{h}.{write.pick('add_(1)', 'mul_(2)', 'relu_()', 'zero_()')}")
    value = _multiplied(write, x, h, near_miss)
    unit = _product(write, value, root, divides)
    return _scaled(write, unit, x, near_miss)


def _functional(write, x):
    width = write.values[x].shape[-1]
    weight = write.pick("None", row_weight(write, width))
    if weight != "None":
        value = write.values[weight]
        if tuple(value.shape) != (width,) or not value.is_floating_point():
            weight = "None"
    eps = write.pick("1e-6", "None", "0.1", "0.0")
    return write.let("y", f"F.rms_norm({x}, ({width},), {weight}, {eps})")


def _inverse_root(write, h, near_miss):
    variance = _variance(write, h, near_miss)
    if near_miss == "clamped":
        bound = f"torch.tensor(1e-6, dtype={write.values[variance].dtype})"
        bounded = (f"{variance}.clamp(min=1e-6)", f"torch.maximum({variance}, {bound})")
        variance = write.let("v", write.pick(*bounded))
    else:
        variance = _with_eps(write, variance, near_miss)
    if near_miss == "other root":
        return write.let("r", f"{variance} ** {write.pick(-0.25, -1.0, -1 / 3)}"), False
    disturb(write)
    spelling, divides = write.pick(
        (f"torch.rsqrt({variance})", False),
        (f"{variance}.rsqrt()", False),
        (f"{variance} ** -0.5", False),
        (f"torch.pow({variance}, -0.5)", False),
        (f"1 / torch.sqrt({variance})", False),
        (f"1.0 / {variance} ** 0.5", False),
        (f"torch.sqrt({variance}).reciprocal()", False),
        (f"torch.sqrt({variance})", True),
        (f"{variance}.pow(0.5)", True),
        odd=(
            (f"{variance}.rsqrt_()", False),
            (f"{variance}.sqrt_()", True),
            (f"{variance}.sqrt() ** -1", False),
            (f"{variance}.sqrt().double()", True),
            (f"{variance}.rsqrt().half()", False),
            (f"2 / torch.sqrt({variance})", False),
        ),
    )
    root = write.let("r", spelling)
    if write.values[root].dim() < write.values[h].dim() and near_miss != "no keepdim":
        root = write.let("r", write.pick(f"{root}.unsqueeze(-1)", f"{root}[..., None]"))
    # torch's fake tensors get the strides of an expanded factor wrong where x is not contiguous.
    if write.values[h].is_contiguous() and write.chance(10):
        root = write.let("r", write.pick(f"{root}.expand_as({h})", f"{root}.contiguous()"))
    return root, divides


def _variance(write, h, near_miss):
    width, rank = write.values[h].shape[-1], write.values[h].dim()
    squares = (f"{h}.pow(2)", f"{h} * {h}", f"{h} ** 2", f"{h}.square()", f"torch.square({h})")
    square = f"{h}.abs()" if near_miss == "no square" else write.pick(*squares)
    squared = write.let("s", square)
    if write.chance(5):
        _use(write, squared)
    if near_miss == "wrong axis":
        axis = write.pick(*range(rank - 1))
        return write.let("v", f"{squared}.mean({axis}, keepdim=True)")
    if near_miss == "wrong divisor":
        divided = (f"/ {width + 1}", f"* (1 / {width + 1})", f"/ {2 * width}", f"* {width}.5")
        return write.let("v", f"{squared}.sum(-1, keepdim=True) {write.pick(*divided)}")
    if near_miss == "no keepdim":
        return write.let("v", f"{squared}.mean(-1){write.pick('', '.unsqueeze(0)', '[None]')}")
    spelling = write.pick(
        f"{squared}.mean(-1, keepdim=True)",
        f"torch.mean({squared}, dim=-1, keepdim=True)",
        f"{squared}.mean({rank - 1}, True)",
        f"{squared}.mean([-1], keepdim=True)",
        f"{squared}.mean(-1).unsqueeze(-1)",
        f"{squared}.mean(-1)[..., None]",
        f"{squared}.sum(-1, keepdim=True) / {width}",
        f"{squared}.sum(-1, keepdim=True) * (1 / {width})",
        f"{squared}.sum(-1).unsqueeze(-1).div({width})",
        odd=(
            f"{squared}.mean(-1)",
            f"{squared}.sum(-1, keepdim=True)",
            f"{squared}.sum(-1, keepdim=True) / {squared}.shape[-1]",
            f"{squared}.mean(-1, keepdim=True, dtype=torch.float32)",
            f"{squared}.sum(-1, keepdim=True) / torch.tensor({width})",
            f"{squared}.sum(-1, keepdim=True) / torch.tensor([{width}.0])",
            f"{squared}.sum(-1, keepdim=True) * {1 / width:.4g}",
            f"{squared}.sum(-1, keepdim=True).div({width}, rounding_mode='floor')",
            f"{squared}.float().mean(-1, keepdim=True)",
            f"{squared}.mean(-1, keepdim=True).float()",
        ),
    )
    return write.let("v", spelling)


def _with_eps(write, variance, near_miss):
    rows = ", ".join(map(str, write.values[variance].shape))
    if near_miss == "eps vector":
        size = 2 * write.values[variance].numel()
        eps = write.input("eps", f"torch.rand({size})[:{size // 2}].reshape({rows})")
        return write.let("v", f"{variance} + {eps}.to({variance}.dtype)")
    if write.chance(10):
        return variance
    eps = write.pick("1e-6", "1e-5", "0.1", "1", "0.0", odd=("e", "tensor", "made", "vector"))
    if eps == "e":
        eps = write.input("e", "1e-3")  # under `dynamic`, an input of the graph
    if eps == "tensor":
        shape, dtype = write.pick("()", "(1,)", "(1, 1)"), write.pick(*DTYPES)
        eps = write.input("eps", f"torch.full({shape}, 0.01, dtype={dtype})")
    elif eps == "made":
        eps = write.let("eps", f"torch.tensor(1e-6{write.pick('', ', dtype=torch.float64')})")
    elif eps == "vector":
        eps = write.input("eps", f"torch.rand({write.values[variance].shape[-1]})")
    spelling = write.pick(
        f"{variance} + {eps}",
        f"{eps} + {variance}",
        f"{variance}.add({eps})",
        f"torch.add({variance}, {eps})",
        odd=(f"{variance}.add_({eps})", f"torch.add({variance}, {eps}, alpha=2)"),
    )
    return write.let("v", spelling)


def _multiplied(write, x, h, near_miss):
    if near_miss == "other value":
        return write.let("o", f"{h} * {write.pick(2, 0.5)} + 1")
    if near_miss in ("mutated", "centred"):
        return h
    is_exact = torch.promote_types(write.values[x].dtype, write.values[h].dtype) == (
        write.values[h].dtype
    )
    again = f"{x}.to({write.values[h].dtype})"
    return write.let("h", write.pick(h, *((x, again) if is_exact else ()), odd=(x, again)))


def _product(write, value, root, divides):
    if write.chance(25, plain=True) and not divides:
        root = write.let("r", f"{root}.to({write.values[value].dtype})")
    if write.chance(5):
        _use(write, root)
    disturb(write)
    if divides:
        spellings = (f"{value} / {root}", f"torch.div({value}, {root})", f"{value}.div({root})")
        return write.let("y", write.pick(*spellings))
    if write.chance(15):
        write.attempt(f"{value} *= {root}")
        return value
    spellings = (f"{value} * {root}", f"{root} * {value}", f"torch.mul({value}, {root})")
    return write.let("y", write.pick(*spellings))


def _scaled(write, unit, x, near_miss):
    """Casts, views, the weight, casts."""
    y = _cast(write, unit, x)
    if write.chance(15):
        y = viewed(write, y)
    disturb(write)
    if near_miss == "weight axis":
        rows = write.values[y].shape[0]
        axes = ", ".join("1" for _ in write.values[y].shape[1:])
        weight = write.input("w", f"torch.randn({rows}, {axes})")
        return write.let("y", f"{y} * {weight}")
    if write.chance(80, plain=True):
        factor = _factor(write, y)
        if write.chance(15):
            write.attempt(f"{y} *= {factor}")
        else:
            y = write.let("y", write.pick(f"{y} * {factor}", f"{factor} * {y}"))
    return _cast(write, y, x)


def _cast(write, y, x):
    if write.chance(50, plain=True):
        casts = (f"{y}.to({x}.dtype)", f"{y}.type_as({x})")
        return write.let("y", write.pick(*casts, odd=(f"{y}.half()", f"{y}.bfloat16().float()")))
    return y


def _factor(write, y):
    width = write.values[y].shape[-1]
    dtype = write.pick(*DTYPES, *[str(write.values[y].dtype)] * 4)
    weight = row_weight(write, width, dtype if dtype in DTYPES else None)
    factor = write.pick(
        weight,
        f"(1 + {weight})",
        f"({weight} + 1.0)",
        f"(1.0 + {weight}.float())",
        f"{weight}.float()",
        f"{weight}.to({write.values[y].dtype})",
        f"({weight} + 1).to({write.values[y].dtype})",
        odd=(
            f"({weight} + 1).float()",
            f"({weight} + 0.5)",
            f"(1 - {weight})",
            f"({weight} + {weight})",
            f"{weight}.view(1, -1)",
            f"{weight}.half().float()",
            f"torch.add({weight}, 1, alpha=2)",
            f"{weight}[None]",
            f"{weight}.unsqueeze(-1)",
            f"({weight}.double() + 1).bfloat16()",
        ),
    )
    if factor == weight:
        return weight
    factor = write.let("f", factor)
    value, target = write.values[factor], write.values[y]
    fits = value.dim() <= target.dim() and all(
        size in (1, other)
        for size, other in zip(reversed(value.shape), reversed(target.shape), strict=False)
    )
    return factor if fits else "2.0"


def viewed(write, y):
    shape = write.values[y].shape
    spellings = [f"{y}.reshape(-1, {shape[-1]})", f"{y}.unsqueeze(0)", f"{y}.contiguous()"]
    if len(shape) > 1:
        spellings += [f"{y}.transpose(0, {len(shape) - 2})", f"{y}.flatten(0, -2)", f"{y}[:1]"]
        spellings += [f"{y}.transpose(0, -1).transpose(0, -1)", f"{y}[None]"]
    if shape[-1] % 2 == 0:
        spellings.append(f"{y}.unflatten(-1, (2, -1)).flatten(-2)")
    return write.let("y", write.pick(*spellings))


def _use(write, name):
    write.let("u", write.pick(f"{name} + 1", f"{name}.sum()"))
