"""What `bench` measures: the grid, the bytes, and that every contender computes the same."""

from itertools import product

import pytest
import torch

from normfuse.cli.bench.cells import (
    MODELS,
    ODD_WIDTHS,
    OPS,
    QK,
    ROWS,
    TURNED,
    WHOLE,
    WIDTHS,
    Cell,
    grid,
)
from normfuse.cli.bench.compositions import composition
from normfuse.cli.bench.peers import PEERS, Peer
from normfuse.cli.bench.spellings import gemma3, llama
from normfuse.cli.bench.subjects import subject
from tests import float64

HEADS = {
    "l2_norm": [(16,)],
    "gated_rms_norm": [(32,)],
    "qk_rms_norm": [(32, 8), (32, 16), (8, 4)],
    "qk_rms_norm_rope": [(32, 8), (32, 16), (8, 4)],
    "rope": [(32, 8), (32, 2)],
}
SMALL = [
    Cell(op, 8, 256 if heads == (8, 4) else 128, heads)
    for op in OPS
    for heads in HEADS.get(op, [(1,)])
]
OTHER_TYPES = [Cell(op, 8, 128, dtype=dtype) for op in WHOLE for dtype in ("fp16", "fp32")]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("cell", SMALL + OTHER_TYPES, ids=lambda cell: cell.name)
def test_the_eager_chain_has_the_bits_of_our_op(cell):
    what = subject(cell)
    operands = what.operands("cpu")
    results = what.eager(*operands)
    ours = what.results_of(what.op(*what.arguments(*operands)))
    for result, own in zip(results, ours, strict=True):
        assert torch.equal(result, own)
        assert (result.dtype, result.stride()) == (own.dtype, own.stride())


@pytest.mark.parametrize("cell", SMALL, ids=lambda cell: cell.name)
def test_the_eager_chain_errs_by_roundings_only(cell):
    """`exact` is float64 throughout: eager is near it, and a little away from it."""
    what = subject(cell)
    operands = what.operands("cpu")
    for result, exact in zip(what.eager(*operands), what.exact(operands), strict=True):
        assert exact.dtype == torch.float64
        error = (result.double() - exact).abs().amax() / exact.abs().amax()
        assert 0 < error < 8 * torch.finfo(torch.bfloat16).eps


def test_exact_is_the_formula():
    what = subject(Cell("rms_norm_add_rms_norm", 4, 64))
    x, residual, weight_1, weight_2 = what.operands("cpu")
    total = residual.double() + float64.rms_norm(x, weight_1, 1e-6, 1.0)
    expected = float64.rms_norm(total, weight_2, 1e-6, 1.0), total
    torch.testing.assert_close(what.exact((x, residual, weight_1, weight_2)), expected)


@pytest.mark.parametrize("cell", SMALL, ids=lambda cell: cell.name)
def test_a_part_is_the_same_rows(cell):
    what = subject(cell)
    operands = what.operands("cpu")
    start, length = 1, what.num_cuts - 2
    whole = [y.narrow(what.result_axis, start, length) for y in what.exact(operands)]
    for piece, expected in zip(what.exact(what.part(operands, start, length)), whole, strict=True):
        torch.testing.assert_close(piece, expected)


def test_bytes():
    """Every element once, in bf16: 2 bytes each of M x N, and of the weights."""
    rows, width = 4096, 5376
    block, weight = 2 * rows * width, 2 * width
    expected = {
        "rms_norm": 2 * block + weight,
        "add_rms_norm": 4 * block + weight,
        "rms_norm_add": 3 * block + weight,
        "rms_norm_add_rms_norm": 4 * block + 2 * weight,
        "dual_rms_norm_add": 4 * block + 3 * weight + 2,
        "dual_rms_norm_add_rms_norm": 5 * block + 4 * weight + 2,
        "rms_norms": 4 * block + 3 * weight,
        "l2_norm": 2 * block,
        "gated_rms_norm": 3 * block + weight,
        "modulated_rms_norm": 2 * block + 4 * 2 * weight,
    }
    for op, num_bytes in expected.items():
        assert subject(Cell(op, rows, width)).num_bytes == num_bytes, op
    heads, tables = 2 * 2 * 4096 * (32 + 8) * 128, 2 * 2 * 4096 * 128
    for op, more in (("qk_rms_norm", 0), ("qk_rms_norm_rope", tables)):
        what = subject(Cell(op, 4096, 128, (32, 8)))
        assert what.num_bytes == heads + more + 2 * 2 * 128
        assert what.streams == (1, 1)
    assert subject(Cell("rope", 4096, 128, (32, 8))).num_bytes == heads + tables


def test_streams():
    expected = {"rms_norm": (1, 1), "add_rms_norm": (2, 2), "rms_norms": (1, 3)}
    expected |= {"dual_rms_norm_add": (3, 1), "dual_rms_norm_add_rms_norm": (3, 2)}
    for op, streams in expected.items():
        assert subject(Cell(op, 64, 2816)).streams == streams, op


class TestGrid:
    def test_is_whole_for_the_main_ops(self):
        cells = {(cell.op, cell.rows, cell.width) for cell in grid() if cell.dtype == "bf16"}
        for op in WHOLE:
            assert cells >= set(product([op], ROWS, (*WIDTHS, *ODD_WIDTHS)))
            assert {(op, 4096, 32768), (op, 4096, 65536)} <= cells

    def test_has_every_model_and_type(self):
        cells = grid()
        heads = {(*cell.heads, cell.width) for cell in cells if cell.op == "qk_rms_norm_rope"}
        assert heads == set(MODELS.values())
        turned = {(*cell.heads, cell.width) for cell in cells if cell.op == "rope"}
        assert turned == set(TURNED.values())
        for op in WHOLE:
            assert {c.dtype for c in cells if c.op == op} == {"bf16", "fp16", "fp32"}

    def test_names_every_cell_once(self):
        names = [cell.name for cell in grid()]
        assert len(names) == len(set(names))

    def test_takes_the_most_informative_first(self):
        cells = grid()
        assert [cell.tier for cell in cells] == sorted(cell.tier for cell in cells)
        assert {cell.op for cell in cells[: len(OPS)]} == set(OPS)

    def test_quick_is_its_beginning(self):
        quick = grid(quick=True)
        assert quick == grid()[: len(quick)]
        assert {cell.op for cell in quick} == set(OPS)

    def test_keeps_to_the_ops_that_are_asked_for(self):
        assert {cell.op for cell in grid(["l2_norm"])} == {"l2_norm"}

    def test_a_cell_survives_json(self):
        for cell in grid(quick=True):
            assert Cell.from_json(cell.to_json()) == cell


class EagerPeer(Peer):
    """A library whose kernels are eager's, and which writes its sums over their operands."""

    name, packages, module, stems = "eager", ("torch",), "torch", ()
    is_in_place = takes_strides = True

    def norm(self, x, weight, offset):
        return gemma3(x, weight) if offset else llama(x, weight)

    def add_norm(self, x, residual, weight, offset):
        residual += x
        x.copy_(self.norm(residual, weight, offset))
        return x, residual


def test_a_composition_is_the_chain():
    """Of a peer's norms, but for roundings: Gemma 4's and OLMo's differ from Llama's."""
    composed = set()
    for cell in SMALL:
        chain = composition(EagerPeer(), cell)
        if chain is None:
            continue
        composed.add(cell.op)
        what = subject(cell)
        operands = what.operands("cpu")
        expected = what.exact(operands)
        for result, exact in zip(chain(*operands), expected, strict=True):
            assert result.shape == exact.shape
            error = (result.double() - exact).abs().amax() / exact.abs().amax()
            assert error < 8 * torch.finfo(torch.bfloat16).eps, cell.name
    assert composed == set(OPS) - {"l2_norm", "gated_rms_norm", "modulated_rms_norm", "rope", *QK}


def test_peers_have_names_of_their_own():
    assert [peer.name for peer in PEERS] == ["Liger", "QuACK", "FlashInfer"]
