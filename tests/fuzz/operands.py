"""What random norms read: activations and weights of any type and layout, and writes to them."""

DTYPES = ("torch.bfloat16", "torch.float32", "torch.float16", "torch.float64")


def activation(write, stem, shape, dtype=None):
    dtype = dtype or write.pick(*DTYPES)
    *rows, width = shape
    layouts = [
        f"torch.randn({_sizes(shape)}).to({dtype})",
        f"torch.randn({_sizes([*rows, 3 * width])}).to({dtype})[..., {width}:{2 * width}]",
    ]
    odd = []
    if rows:
        one = _sizes([1, *shape[1:]])
        layouts.append(f"torch.randn({one}).to({dtype}).expand({_sizes(shape)})")
        order = _sizes(reversed(range(len(shape))))
        odd.append(f"torch.randn({_sizes(reversed(shape))}).to({dtype}).permute({order})")
        odd.append(f"torch.randn({_sizes([width, *rows])}).to({dtype}).movedim(0, -1)")
    if len(rows) > 1:
        swapped = _sizes([rows[1], rows[0], *shape[2:]])
        layouts.append(f"torch.randn({swapped}).to({dtype}).transpose(0, 1)")
    expression = write.pick(*layouts, odd=tuple(odd))
    if write.chance(15):
        expression += write.pick(" * 1000", " * 1e-4", " * 0", " / 0", ".relu()")
    return write.input(stem, expression, learnable=write.chance(50, plain=True))


def _sizes(shape):
    return ", ".join(map(str, shape))


def row_weight(write, width, dtype=None):
    known = [name for name, value in write.tensors().items() if tuple(value.shape) == (width,)]
    if known and write.chance(30):
        return write.pick(*known)
    dtype = dtype or write.pick(*DTYPES)
    expression = write.pick(
        f"torch.randn({width}).to({dtype})",
        odd=(
            f"torch.randn({2 * width}).to({dtype})[::2]",
            f"torch.randn(1).to({dtype}).expand({width})",
            f"torch.randn(1, {width}).to({dtype})",
            f"torch.randn(()).to({dtype})",
            f"torch.randn(1).to({dtype})",
            f"torch.zeros({width}).to({dtype})",
            f"torch.randint(-3, 3, ({width},))",
        ),
    )
    return write.input("w", expression, learnable=not expression.startswith("torch.randint"))


_WRITES = (
    "{0}.add_(1)",
    "{0}.mul_(2)",
    "{0} += 1",
    "{0} *= 0.5",
    "{0}[..., 0] = 0",
    "{0}.zero_()",
    "{0}[..., :1].add_(3)",
    "torch.relu_({0})",
    "F.relu({0}, inplace=True)",
    "torch.add({0}, 1, out={0})",
    "{0}.view(-1).mul_(3)",
    "{0}.detach().add_(1)",
    "{0}.copy_({0} + 1)",
)


def disturb(write):
    """Sometimes, a write to any value that exists."""
    if not write.chance(7):
        return
    name = write.pick(*[n for n, value in write.tensors().items() if value.is_floating_point()])
    write.attempt(write.pick(*_WRITES).format(name))
