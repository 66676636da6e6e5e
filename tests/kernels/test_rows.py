"""How tensors of any strides are laid out and addressed as rows."""

from itertools import permutations, product

import pytest
import torch

from normfuse.ops.kernels.rows import addressed, empty_sum, row_order
from tests.kernels import interpreted

SHAPE = (2, 3, 4, 5)


def layouts_of(shape):
    """Tensors of one shape: every order of the dimensions in memory, dense, sliced and expanded."""
    for order in permutations(range(len(shape))):
        inverse = [order.index(dim) for dim in range(len(shape))]
        for step, size_one in product((1, 2), (None, *range(len(shape)))):
            sizes = [1 if dim == size_one else shape[dim] for dim in order]
            sizes[-1] *= step
            base = torch.empty(sizes)[..., ::step]
            yield base.permute(inverse).expand(shape)


@pytest.mark.parametrize("is_fresh", [True, False])
def test_a_sum_is_laid_out_as_torch_does(is_fresh):
    wrong = []
    tensors = list(layouts_of(SHAPE[:3]))
    for branch, residual in product(tensors, tensors):
        total = empty_sum(branch, residual, torch.float64, is_fresh=is_fresh)

        expected = residual + (branch * 2 if is_fresh else branch)
        if (total.shape, total.stride()) != (expected.shape, expected.stride()):
            wrong.append((branch.stride(), residual.stride(), total.stride(), expected.stride()))
    assert not wrong, wrong[:5]


def test_rows_are_addressed_in_the_order_of_the_result():
    for x in layouts_of(SHAPE):
        y = torch.empty_like(x)
        order = row_order(y)
        if order is None:  # the last dimension is not the innermost
            assert y.stride(-1) != 1
            continue

        rows, strides = addressed(x, order, y)

        offsets = _offsets(strides, x[..., 0].numel())
        starts = torch.empty_like(y[..., 0], dtype=torch.int64)
        starts.as_strided((starts.numel(),), (1,)).copy_(offsets)  # row r of y begins at r * N
        expected = _positions(rows)[..., 0]
        assert torch.equal(starts, expected), (x.stride(), strides)


def _offsets(strides, num_rows):
    """What the kernel computes for each row."""
    row = torch.arange(num_rows)
    inner = row % strides.size_inner
    middle = row // strides.size_inner % strides.size_middle
    outer = row // strides.size_inner // strides.size_middle
    return (
        outer * strides.stride_outer + middle * strides.stride_middle + inner * strides.stride_inner
    )


def _positions(tensor):
    """The offset of every element."""
    grids = torch.meshgrid(*(torch.arange(size) for size in tensor.shape), indexing="ij")
    return sum(grid * stride for grid, stride in zip(grids, tensor.stride(), strict=True))


@pytest.mark.parametrize(
    ("first", "bound"),
    [(0, 100), (2**31 - 5, 2**31 - 1), (2**31 - 5, 2**31 + 3), (2**40, 2**40 + 8)],
    ids=["few", "up to the last of 32 bits", "one bit more", "many more"],
)
def test_rows_are_numbered_along_three_axes(first, bound, interpreter):
    """The last tile may go on behind the last row: those numbers are used for nothing."""
    middle, inner = 7, 12
    numbers = torch.empty(8, 3, dtype=torch.int64).share_memory_()
    names = ("numbers_ptr", "first", "bound", "size_middle", "size_inner", "ROWS")
    arguments = dict(zip(names, (numbers, first, bound, middle, inner, 8), strict=True))
    kernel = ("tests.kernels.row_numbers", "row_numbers_kernel", (1,))
    interpreter.submit(interpreted.run, *kernel, arguments).result()

    rows = range(first, min(first + 8, bound))
    expected = [[row // inner // middle, row // inner % middle, row % inner] for row in rows]
    assert numbers[: len(rows)].tolist() == expected
