"""The backward kernels, compiled for GPUs that are not here: no register is spilled."""

import re
from dataclasses import replace

import pytest

from tests.kernels.inputs import BF16, F32, F64

pytest.importorskip("triton", reason="compiles with triton")
cross_compile = pytest.importorskip("tests.kernels.cross_compile")
backward = pytest.importorskip("tests.kernels.cross_compile_backward")
SHARED_MEMORY = 227 * 1024  # of a program on sm_90, in bytes
MANY_ROWS = 32768


def spilled(stem, width, dtype, target, path, **sizes):
    compiled = backward.compile_backward(stem, width, dtype, target, **sizes)
    return {
        name: cross_compile.resources(kernel, path / "cubin")["spilled"]
        for name, kernel in compiled.items()
    }


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
@pytest.mark.parametrize("width", [256, 1024, 2816, 4096, 5376, 8192])
@pytest.mark.parametrize("stem", backward.STEMS)
def test_no_target_spills(stem, width, target, tmp_path):
    assert set(spilled(stem, width, BF16, target, tmp_path).values()) == {0}


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
@pytest.mark.parametrize("width", [1152, 2048, 4096])
def test_two_rows_at_once_do_not_spill(width, target, tmp_path):
    sizes = ("rms_norm_backward", width, BF16, target, tmp_path)

    assert set(spilled(*sizes, num_rows=MANY_ROWS).values()) == {0}


def test_two_rows_at_once_where_they_are_many_and_programs_would_drift_apart():
    def rows(width, num_rows=MANY_ROWS, **sizes):
        return backward.BackwardLaunch.for_shape(width, num_rows, BF16, **sizes).rows

    assert rows(4096) == 2
    assert rows(4096, num_rows=16384) == 1, "too few rows to drift"
    assert rows(4096, operands=3) == 1
    assert rows(5376) == 1, "a multiprocessor has one program"
    assert rows(16384) == 1, "rows are not held"


# The widest rows that are held in registers, and wider ones.
@pytest.mark.parametrize(
    ("width", "dtype"), [(12288, BF16), (16384, BF16), (8192, F32), (4096, F64), (65536, F32)]
)
@pytest.mark.parametrize("stem", backward.STEMS)
def test_a_wide_row_does_not_spill(stem, width, dtype, tmp_path):
    assert set(spilled(stem, width, dtype, "sm_90", tmp_path).values()) == {0}


# The widest rows that are held, by type.
@pytest.mark.parametrize(
    ("width", "dtype"), [(8192, BF16), (12288, BF16), (6144, F32), (2048, F64)]
)
@pytest.mark.parametrize("stem", backward.STEMS)
def test_rows_on_their_way_have_room(stem, width, dtype):
    kernel, *_ = backward.compile_backward(stem, width, dtype, "sm_90").values()

    assert kernel.metadata.shared <= SHARED_MEMORY


@pytest.mark.parametrize(("width", "dtype"), [(4096, BF16), (3072, F32), (1536, F64)])
@pytest.mark.parametrize("stem", backward.MANY_NORMS)
def test_rows_of_several_norms_have_room(stem, width, dtype):
    assert backward.compile_norms(stem, width, dtype, "sm_90").metadata.shared <= SHARED_MEMORY


@pytest.mark.parametrize("total", [48, 64, 99, 163, 227])
@pytest.mark.parametrize("width", [1024, 5376, 8192, 12288])
def test_a_gpu_with_less_shared_memory_has_fewer_rows_on_their_way(width, total):
    launch = backward.BackwardLaunch.for_shape(
        width, 4096, BF16, norms=2, operands=4, shared_memory=total * 1024
    )

    ahead = (launch.stages - 1) * 4 * launch.block * launch.chunks * BF16.itemsize
    assert launch.stages >= 1
    assert ahead < total * 1024
    assert launch == replace(
        backward.BackwardLaunch.for_shape(width, 4096, BF16, norms=2, operands=4),
        stages=launch.stages,
    ), "nothing else, and so no bit, depends on the GPU"


@pytest.mark.parametrize("stem", backward.STEMS)
def test_the_next_rows_are_loaded_meanwhile(stem):
    kernel, *_ = backward.compile_backward(stem, 4096, BF16, "sm_90").values()

    assert "cp.async" in kernel.asm["ptx"]


@pytest.mark.parametrize("stem", backward.STEMS)
def test_offsets_of_rows_have_64_bits(stem):
    for kernel in backward.compile_backward(stem, 256, BF16, "sm_90").values():
        products = re.findall(r"arith\.muli .* : (\S+)", kernel.asm["ttir"])
        assert any("i64" in product for product in products), products


@pytest.mark.parametrize(
    ("layout", "target"), [("half", "sm_90"), ("interleaved", "sm_90"), ("half", "gfx942")]
)
@pytest.mark.parametrize("width", [64, 128, 256, 512, 1024])
def test_heads_do_not_spill(width, layout, target, tmp_path):
    compiled = backward.compile_heads(width, layout, target)

    assert cross_compile.resources(compiled, tmp_path / "cubin")["spilled"] == 0


@pytest.mark.parametrize("table_dtype", [BF16, F32])
@pytest.mark.parametrize("dtype", [BF16, F32, F64])
def test_heads_on_their_way_have_room_on_a_small_gpu(dtype, table_dtype):
    """A program of sm_86 and sm_89 may have 99 KiB."""
    compiled = backward.compile_heads(128, "half", "sm_90", dtype, table_dtype)

    assert compiled.metadata.shared <= 99 * 1024


def test_a_program_holds_weights_where_it_holds_x():
    """Threads that hold others exchange them through shared memory, 16 bits at a time."""
    compiled = backward.compile_heads(512, "half", "sm_90")

    assert "ld.shared.b16" not in compiled.asm["ptx"]


@pytest.mark.parametrize("width", [256, 2816, 4096, 5376])
@pytest.mark.parametrize("stem", backward.MANY_NORMS)
def test_several_norms_do_not_spill(stem, width, tmp_path):
    compiled = backward.compile_norms(stem, width, BF16, "sm_90")

    assert cross_compile.resources(compiled, tmp_path / "cubin")["spilled"] == 0


@pytest.mark.parametrize("stem", backward.MANY_NORMS)
def test_several_norms_do_not_spill_on_cdna(stem, tmp_path):
    compiled = backward.compile_norms(stem, 2816, BF16, "gfx942")

    assert cross_compile.resources(compiled, tmp_path / "cubin")["spilled"] == 0


# The most norms: the widest rows that are held in registers, and wider ones.
@pytest.mark.parametrize(("width", "dtype"), [(3072, F32), (8192, F32), (1536, F64), (2048, F64)])
@pytest.mark.parametrize("stem", ["rms_norms_backward", "dual_rms_norm_add_rms_norm_backward"])
def test_four_norms_do_not_spill(stem, width, dtype, tmp_path):
    compiled = backward.compile_norms(stem, width, dtype, "sm_90", count=4)

    assert cross_compile.resources(compiled, tmp_path / "cubin")["spilled"] == 0


def test_streamed_rows_of_four_norms_spill_nothing_to_memory_on_cdna():
    """A few scalar registers with addresses do wait in lanes of vector registers."""
    compiled = backward.compile_norms("dual_rms_norm_add_rms_norm_backward", 8192, BF16, "gfx942")

    spilled = re.findall(
        r"\.(?:vgpr_spill_count|private_segment_fixed_size):\s+(\d+)", compiled.asm["amdgcn"]
    )
    assert spilled == ["0", "0"]


@pytest.mark.parametrize("stem", backward.MANY_NORMS)
def test_the_next_rows_of_several_norms_are_loaded_meanwhile(stem):
    assert "cp.async" in backward.compile_norms(stem, 2816, BF16, "sm_90").asm["ptx"]
