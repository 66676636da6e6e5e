"""The backward kernels of gates and modulations, compiled for GPUs that are not here."""

import re

import pytest

from tests.kernels.inputs import BF16, F32, F64

pytest.importorskip("triton", reason="compiles with triton")
cross_compile = pytest.importorskip("tests.kernels.cross_compile")
backward = pytest.importorskip("tests.kernels.cross_compile_gated_backward")
GATES = ("gate last", "gate first", "gates of groups")
SHARED_MEMORY = 227 * 1024  # of a program on sm_90, in bytes


def spilled(stem, width, dtype, target, path):
    compiled = backward.compile_backward(stem, width, dtype, target)
    return {
        name: cross_compile.resources(kernel, path / "cubin")["spilled"]
        for name, kernel in compiled.items()
    }


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
@pytest.mark.parametrize("width", [256, 4096, 8192])
@pytest.mark.parametrize("stem", backward.STEMS)
def test_no_target_spills(stem, width, target, tmp_path):
    assert set(spilled(stem, width, BF16, target, tmp_path).values()) == {0}


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
@pytest.mark.parametrize("width", [64, 128, 1024])
@pytest.mark.parametrize("stem", GATES)
def test_rows_that_share_a_weight_do_not_spill(stem, width, target, tmp_path):
    assert set(spilled(stem, width, BF16, target, tmp_path).values()) == {0}


# Rows of which two chunks are held, the widest held in float32, and wider ones.
@pytest.mark.parametrize(
    ("width", "dtype"),
    [(2816, BF16), (12288, BF16), (6144, F32), (8192, F32), (4096, F64), (65536, F32)],
)
@pytest.mark.parametrize("stem", ["gate last", "gate first", "modulated rows"])
def test_a_wide_row_does_not_spill(stem, width, dtype, tmp_path):
    assert set(spilled(stem, width, dtype, "sm_90", tmp_path).values()) == {0}


# The widest rows that are held, by type.
@pytest.mark.parametrize(("width", "dtype"), [(8192, BF16), (6144, F32), (2048, F64)])
@pytest.mark.parametrize("stem", ["gate last", "gate first", "modulated rows"])
def test_rows_on_their_way_have_room(stem, width, dtype):
    kernel, *_ = backward.compile_backward(stem, width, dtype, "sm_90").values()

    assert kernel.metadata.shared <= SHARED_MEMORY


@pytest.mark.parametrize("stem", GATES)
def test_a_program_holds_weights_where_it_holds_x(stem):
    """Threads that hold others exchange them through shared memory, 16 bits at a time."""
    kernel, *_ = backward.compile_backward(stem, 128, BF16, "sm_90").values()

    assert "ld.shared.b16" not in kernel.asm["ptx"]


@pytest.mark.parametrize("stem", backward.STEMS)
def test_the_next_rows_are_loaded_meanwhile(stem):
    kernel, *_ = backward.compile_backward(stem, 4096, BF16, "sm_90").values()

    assert "cp.async" in kernel.asm["ptx"]


@pytest.mark.parametrize("stem", backward.STEMS)
def test_offsets_of_rows_have_64_bits(stem):
    for kernel in backward.compile_backward(stem, 256, BF16, "sm_90").values():
        products = re.findall(r"arith\.muli .* : (\S+)", kernel.asm["ttir"])
        assert any("i64" in product for product in products), products
