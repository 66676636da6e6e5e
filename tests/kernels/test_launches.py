"""The table of launches, and that a row's bits depend on nothing but the row."""

from itertools import pairwise

import pytest
import torch

from normfuse.ops.residual_sum import Scales
from tests.kernels.inputs import BF16, F32, F64, gemma, llama, random

pytest.importorskip("triton", reason="tile.py asks triton what it runs on")
launches = pytest.importorskip("normfuse.ops.kernels.launches")
tile = pytest.importorskip("normfuse.ops.kernels.tile")


TABLES = [
    pytest.param(table, id=f"{op}, {name}")
    for name, tables in (("aligned", launches.LAUNCHES), ("odd", launches.ODD_LAUNCHES))
    for op, table in tables.items()
]


@pytest.mark.parametrize("entries", TABLES)
def test_an_entry_can_be_launched_and_no_width_has_two(entries):
    for entry in entries:
        assert entry.narrowest <= entry.widest
        assert entry.rows * entry.block >= 32 * entry.num_warps, "every lane has an element"
        assert entry.block & (entry.block - 1) == 0
    for narrower, wider in pairwise(entries):
        assert narrower.widest < wider.narrowest


def test_measured_widths_take_the_table_and_other_types_a_rule():
    measured = tile.Launch.for_shape(5376, BF16, F32, op="rms_norm")
    ruled = tile.Launch.for_shape(5376, F32, F32, op="rms_norm")

    entry = next(e for e in launches.LAUNCHES["rms_norm"] if e.narrowest <= 5376 <= e.widest)
    assert (measured.block, measured.num_warps) == (entry.block, entry.num_warps)
    assert ruled == tile.Launch.by_rule(5376, F32)
    assert tile.Launch.for_shape(5376, BF16, F64, op="rms_norm") == tile.Launch.by_rule(5376, F64)


def test_rows_that_begin_anywhere_have_launches_of_their_own():
    (odd,) = launches.ODD_LAUNCHES["add_rms_norm"]
    for width, is_odd in ((768, False), (769, True), (772, True), (776, False)):
        launch = tile.Launch.for_shape(width, BF16, F32, op="add_rms_norm")
        assert ((launch.block, launch.num_warps) == (odd.block, odd.num_warps)) == is_odd
    assert tile.Launch.for_shape(769, F32, F32, op="add_rms_norm") == tile.Launch.by_rule(769, F32)


def test_the_rule_asks_for_weights_ahead_where_rows_are_few_and_registers_many():
    narrow, wide = tile.Launch.by_rule(4096, F32), tile.Launch.by_rule(32768, F32)

    assert narrow.few.split() == ["ahead", "held"]
    assert (narrow.many, wide.few, wide.many) == ("held",) * 3
    assert tile.Launch.by_rule(128, F32).few == "held"


@pytest.mark.parametrize("op", [*launches.LAUNCHES, "an op without measurements"])
@pytest.mark.parametrize("width", [48, 128, 769, 1024, 2816, 5376, 16384, 65536])
def test_the_order_of_a_sum_does_not_depend_on_the_number_of_rows(op, width):
    launch = tile.Launch.for_shape(width, BF16, F32, op=op)

    few, *more = (launch.constants(width, rows) for rows in (1, 512, 2047, 1_000_000))

    for other in more:
        assert {**few, "READS": None} == {**other, "READS": None}
        assert ("held" in few["READS"]) == ("held" in other["READS"])


def test_rows_are_read_by_how_many_there_are():
    launch = tile.Launch(1, 1024, 4, few="few streamed", middle="middle", many="many")

    def reads(rows):
        return launch.constants(1024, rows)["READS"].split()[0]

    by_rows = {rows: reads(rows) for rows in (1, 511, 512, 2047, 2048)}
    assert list(by_rows.values()) == ["few", "few", "middle", "middle", "many"]


@pytest.mark.parametrize("width", [64, 769, 2816])
def test_a_row_has_the_same_bits_alone_and_among_others(launch, width):
    x, residual, weight = random(9, width), random(9, width), random(width)
    norms = 1e-6, 1.0, gemma(BF16), 1e-6, 1.0, llama(BF16)

    def sandwich(rows):
        operands = x[rows], residual[rows], weight, weight, Scales(), *norms
        return launch("rms_norm_add_rms_norm", *operands)

    together = sandwich(slice(None))
    for row in (0, 4, 8):
        for alone, among in zip(sandwich(slice(row, row + 1)), together, strict=True):
            assert torch.equal(alone[0], among[row])
