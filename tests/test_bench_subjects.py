"""What `bench` measures: grid, operands, bytes; every contender computes what our op means."""

import pytest
import torch

from normfuse.cli.bench.cells import OPS, Cell
from normfuse.cli.bench.subjects import subject

HEADS = {
    "l2_norm": [(16,)],
    "gated_rms_norm": [(32,)],
    "qk_rms_norm": [(32, 8), (32, 16), (8, 4)],
    "qk_rms_norm_rope": [(32, 8), (32, 16), (8, 4)],
}
SMALL = [
    Cell(op, 3 if op != "modulated_rms_norm" else 8, 256 if heads == (8, 4) else 128, heads, dtype)
    for op in OPS
    for heads in HEADS.get(op, [(1,)])
    for dtype in ("bf16", "fp16", "fp32")
]


@pytest.mark.parametrize("cell", SMALL, ids=lambda cell: cell.name)
def test_the_eager_chain_has_the_bits_of_our_op(cell):
    torch.manual_seed(0)
    small = subject(cell)
    operands = small.operands("cpu")
    results = small.eager(*operands)
    ours = small.results_of(small.op(*small.arguments(*operands)))
    for result, own in zip(results, ours, strict=True):
        assert torch.equal(result, own)
        assert result.dtype == own.dtype
        assert result.stride() == own.stride()
