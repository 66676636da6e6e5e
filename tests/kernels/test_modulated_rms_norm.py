"""The kernel of `modulated_rms_norm`, interpreted."""

import pytest
import torch

from normfuse.ops.modulated_rms_norm import modulated_rms_norm_fake, modulated_rms_norm_reference
from normfuse.ops.modulation import Modulation
from normfuse.ops.rounding import RoundingPlan
from tests import float64
from tests.kernels.inputs import (
    BF16,
    F16,
    F32,
    F64,
    VIEWS,
    WIDTHS,
    assert_same_bits,
    changed,
    gemma,
    integers,
    layouts,
    llama,
    random,
)

EPS = 1e-6

# VibeVoice's in bfloat16, one rounding, a factor in bfloat16, a sum that is not rounded.
MODULATIONS = (
    Modulation(BF16, BF16, BF16, BF16),
    Modulation(F32, F32, F32, BF16),
    Modulation(BF16, F32, F32, BF16),
    Modulation(BF16, BF16, F32, F32),
)


def texts(arguments):
    """The arguments of the launcher as the op has them."""
    return tuple(str(a) if isinstance(a, (RoundingPlan, Modulation)) else a for a in arguments)


def assert_errs_no_more_than_eager(results, arguments):
    eager = modulated_rms_norm_reference(*texts(arguments))
    exact = float64.modulated_rms_norm(*arguments[:-2])
    float64.assert_as_close_as_eager(results[0], eager[0], exact)
    assert layouts(results) == layouts(modulated_rms_norm_fake(*texts(arguments)))


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("width", WIDTHS)
def test_errs_no_more_than_eager(launch, width, dtype):
    x, scale, shift = (random(*rows, width, dtype=dtype) for rows in ((2, 3), (2, 1), (2, 1)))
    norm = (random(width, dtype=dtype), EPS, 1.0, 1.0, gemma(F32), Modulation.once(dtype))

    results = launch("modulated_rms_norm", x, scale, shift, *norm)

    assert_errs_no_more_than_eager(results, (x, scale, shift, *norm))


# Scale and shift of x (2, 3, 5, 64): a value for each row, sequence, position, or for all.
MODULATORS = {
    "full": lambda: random(2, 3, 5, 64),
    "of a sequence": lambda: random(2, 1, 1, 64),
    "of a position": lambda: random(5, 64),
    "of the middle": lambda: random(3, 1, 64),
    "of all rows": lambda: random(64),
    "a chunk": lambda: random(2, 1, 1, 192).chunk(3, dim=-1)[1],
    "expanded": lambda: random(2, 1, 1, 64).expand(2, 3, 5, 64),
    "of every second column": lambda: random(2, 1, 5, 128)[..., ::2],
}


@pytest.mark.parametrize("modulator", MODULATORS)
@pytest.mark.parametrize("scale_offset", [0.0, 1.0])
@pytest.mark.parametrize("is_shifted", [False, True])
def test_broadcasts_over_rows(launch, is_shifted, scale_offset, modulator):
    x, scale = random(2, 3, 5, 64), MODULATORS[modulator]()
    shift = MODULATORS[modulator]() if is_shifted else None
    norm = (random(64), EPS, 0.0, scale_offset, llama(BF16), Modulation(*(BF16,) * 4))

    results = launch("modulated_rms_norm", x, scale, shift, *norm)

    assert_errs_no_more_than_eager(results, (x, scale, shift, *norm))


@pytest.mark.parametrize("view", VIEWS)
def test_takes_rows_of_any_strides(launch, view):
    x = VIEWS[view]()
    norm = (None, EPS, 0.0, 1.0, RoundingPlan.once(BF16, None), Modulation.once(BF16))
    arguments = (x, random(64), random(*x.shape), *norm)

    results = launch("modulated_rms_norm", *arguments)

    assert_errs_no_more_than_eager(results, arguments)
    assert layouts(results) == layouts(modulated_rms_norm_reference(*texts(arguments)))


@pytest.mark.parametrize("modulation", MODULATIONS, ids=str)
@pytest.mark.parametrize("is_shifted", [False, True])
def test_every_rounding_of_the_modulation_has_eagers_bits(launch, is_shifted, modulation):
    x, scale, shift = integers(64, 64), random(64, 64, dtype=F32), random(64, 64)
    norm = (random(64), 0.0, 0.0, 1.0, gemma(modulation.product))
    arguments = (x, scale, shift if is_shifted else None, *norm)

    results = launch("modulated_rms_norm", *arguments, modulation)

    assert_same_bits(results, modulated_rms_norm_reference(*texts((*arguments, modulation))))
    if is_shifted:
        others = [
            modulated_rms_norm_reference(*texts((*arguments, other)))
            for other in MODULATIONS
            if other != modulation and other.out == modulation.out
        ]
        assert all(changed(results[0], other[0]) > 0 for other in others)


def test_reads_a_wide_row_in_chunks(launch, narrow_tile):
    arguments = (integers(5, 64), random(5, 64), random(64), random(64), 0.0, 1.0, 1.0)
    arguments += (gemma(BF16), Modulation(*(BF16,) * 4))

    results = launch("modulated_rms_norm", *arguments, tile=narrow_tile)

    assert_same_bits(results, modulated_rms_norm_reference(*texts(arguments)))


def test_numbers_are_exact_in_float64(launch):
    x, scale, shift = integers(4, 64, dtype=F64), random(4, 64, dtype=F64), random(64, dtype=F64)
    norm = (None, 0.1, 0.0, 0.1, RoundingPlan.once(F64, None), Modulation.once(F64))

    results = launch("modulated_rms_norm", x, scale, shift, *norm)

    assert_same_bits(results, modulated_rms_norm_reference(*texts((x, scale, shift, *norm))))


@pytest.mark.parametrize("shape", [(0, 64), (2, 0, 3, 64)])
def test_no_rows(launch, shape):
    norm = (torch.ones(64), EPS, 0.0, 1.0, llama(BF16), Modulation.once(BF16))
    arguments = (torch.ones(shape, dtype=BF16), torch.ones(64), None, *norm)

    results = launch("modulated_rms_norm", *arguments)

    assert layouts(results) == layouts(modulated_rms_norm_fake(*texts(arguments)))


def test_leaves_out_what_nobody_reads(launch):
    norm = (random(64), EPS, 0.0, 1.0, llama(BF16), Modulation.once(BF16))

    _, rstd = launch("modulated_rms_norm", random(3, 64), random(64), None, *norm, store_rstd=False)

    assert rstd is None
