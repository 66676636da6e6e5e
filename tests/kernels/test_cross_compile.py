"""The kernels, compiled for GPUs that are not here: no register is spilled, no sum contracted."""

import re
from itertools import product

import pytest

from normfuse.ops.rounding import RoundingPlan
from tests.kernels.inputs import BF16, F32, F64, gemma, llama

pytest.importorskip("triton", reason="compiles with triton")
cross_compile = pytest.importorskip("tests.kernels.cross_compile")

PLANS = {"llama": llama(BF16), "gemma": gemma(BF16)}


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942", "gfx950"])
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("stem", cross_compile.KERNELS)
def test_no_target_spills(stem, plan, target, tmp_path):
    spilled = {}
    for width in (256, 4096, 5376, 8192):
        compiled = cross_compile.compile_kernel(stem, width, BF16, PLANS[plan], target)
        spilled[width] = cross_compile.resources(compiled, tmp_path / "cubin")["spilled"]

    assert spilled == dict.fromkeys(spilled, 0)


@pytest.mark.parametrize(
    ("layout", "target"),
    [
        *(("half", target) for target in ("sm_80", "sm_90", "sm_100", "gfx942", "gfx950")),
        ("interleaved", "sm_90"),
    ],
)
def test_heads_do_not_spill(layout, target, tmp_path):
    spilled = {}
    for width, dtype, tokens in product((128, 256, 512), (BF16, F32), (16, 8192)):
        compiled = cross_compile.compile_heads(width, dtype, layout, target, tokens)
        found = cross_compile.resources(compiled, tmp_path / "cubin")
        spilled[width, dtype, tokens] = found["spilled"]

    assert spilled == dict.fromkeys(spilled, 0)


@pytest.mark.parametrize("target", cross_compile.TARGETS)
@pytest.mark.parametrize("into", ["caches", "copies"])
def test_heads_that_go_elsewhere_do_not_spill(into, target, tmp_path):
    for width, tokens in product((128, 256), (16, 8192)):
        compiled = cross_compile.compile_heads(width, BF16, "half", target, tokens, into)
        found = cross_compile.resources(compiled, tmp_path / "cubin")
        assert found["spilled"] == 0, (width, tokens)


@pytest.mark.parametrize("target", cross_compile.TARGETS)
@pytest.mark.parametrize("num", [16, 32, 40])
def test_joint_norms_do_not_spill(num, target, tmp_path):
    for tokens, into in ((16, ""), (8192, "caches")):
        how = {"num": num, "is_joint": True}
        compiled = cross_compile.compile_heads(128, BF16, "half", target, tokens, into, **how)
        found = cross_compile.resources(compiled, tmp_path / "cubin")
        assert found["spilled"] == 0, (tokens, into)


@pytest.mark.parametrize(("tokens", "bits"), [(8192, {"32"}), (2**27, {"32", "64"})])
def test_rows_are_divided_in_32_bits_where_their_number_fits(tokens, bits):
    """In 64 it is a call into a hundred instructions, and nothing is read before."""
    for into in ("", "caches"):
        compiled = cross_compile.compile_heads(128, BF16, "half", "sm_90", tokens, into)
        assert set(re.findall(r"\b(?:div|rem)\.[su](\d+)", compiled.asm["ptx"])) == bits


def test_nothing_is_read_behind_the_check_of_a_position():
    """It is a barrier: what is read behind it would wait for the position first."""
    as_inductor = {"debug": True, "sanitize_overflow": False}
    compiled = cross_compile.compile_heads(128, BF16, "half", "sm_90", into="caches", **as_inductor)
    found = re.findall(r"(ld|st)\.global|(bar)\.sync", compiled.asm["ptx"])
    order = " ".join("".join(words) for words in found)
    # q has no position, k and v have.
    assert re.fullmatch(r"(ld )+(st )+((ld )+(st )+bar ?){2}", order), order


# Rows around `tile.WIDEST_HELD`, some held and some read again, the widest with weights ahead, and
# one that all read again.
@pytest.mark.parametrize("stem", cross_compile.KERNELS)
@pytest.mark.parametrize(
    ("width", "dtype", "plan"),
    [
        (32768, BF16, gemma(BF16)),
        (32768, F32, RoundingPlan.once(F32, F32)),
        (8192, F32, RoundingPlan.once(F32, F32)),
        (16384, F64, RoundingPlan.once(F64, F64)),
        (131072, BF16, gemma(BF16)),
        (131072, F32, RoundingPlan.once(F32, F32)),
        (131072, F64, RoundingPlan.once(F64, F64)),
    ],
)
def test_a_wide_row_does_not_spill(stem, width, dtype, plan, tmp_path):
    compiled = cross_compile.compile_kernel(stem, width, dtype, plan, "sm_90")

    assert cross_compile.resources(compiled, tmp_path / "cubin")["spilled"] == 0


@pytest.mark.parametrize(
    "stem",
    [
        "modulated_rms_norm",
        "rms_norm_add",
        "rms_norm_add_rms_norm",
        "dual_rms_norm_add",
        "dual_rms_norm_add_rms_norm",
    ],
)
def test_no_product_is_contracted_with_the_sum_that_reads_it(stem):
    """Eager rounds the product and the sum; one FMA for both would round once."""
    plan = RoundingPlan.once(F32, F32)

    ptx = cross_compile.compile_kernel(stem, 256, F32, plan, "sm_90").asm["ptx"]

    fused = re.findall(r"fma\.rn\.f32\s+\S+ (\S+), (\S+), (\S+);", ptx)
    squares = [(a, b) for a, b, _ in fused if a == b]
    assert squares, "the squares are summed by FMAs, so the pattern finds them"
    assert {addend for a, b, addend in fused if a != b} == {"0f00000000"}


@pytest.mark.parametrize("stem", cross_compile.KERNELS)
def test_offsets_of_rows_have_64_bits(stem):
    ttir = cross_compile.compile_kernel(stem, 256, BF16, llama(BF16), "sm_90").asm["ttir"]

    products = re.findall(r"arith\.muli .* : (\S+)", ttir)
    assert products
    assert all("i64" in product for product in products), products
