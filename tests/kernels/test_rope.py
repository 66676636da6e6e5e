"""RoPE without a norm in the kernel of `qk_rms_norm_rope`, interpreted: rotations, rows, bits."""

import pytest

from normfuse.ops.rope import rope_fake, rope_reference
from normfuse.ops.rotation import Rotation
from tests import float64
from tests.kernels.inputs import BF16, F16, F32, F64, assert_same_bits, layouts, random
from tests.kernels.test_qk_rms_norm_rope import ROTATIONS, queries_and_keys, rotation, tables


def run(launch, xs, cos, sin, rotations, **keywords):
    turns = [Rotation.parse(text) for text in rotations]
    return launch("rope", xs, cos, sin, turns, **keywords)


@pytest.mark.parametrize("name", ROTATIONS)
@pytest.mark.parametrize("dtype", [BF16, F16, F32, F64])
def test_every_rotation_has_eagers_bits(launch, dtype, name):
    xs = queries_and_keys(random, dtype)
    turns = [rotation(name, dtype), rotation(name, dtype, contiguous=True)]
    arguments = (xs, *tables(name, dtype), turns)

    results = run(launch, *arguments)

    assert layouts(results) == layouts(rope_fake(*arguments))
    if name == "complex" and dtype != F64:  # a CPU may contract its product to FMAs
        exact = [rotation(name, F64), rotation(name, F64, contiguous=True)]
        wide = [x.double() for x in xs], *(table.double() for table in arguments[1:3])
        truths = rope_reference(*wide, exact)
        for result, other, truth in zip(results, rope_reference(*arguments), truths, strict=True):
            float64.assert_as_close_as_eager(result, other, truth)
    else:
        assert_same_bits(results, rope_reference(*arguments))


def test_tables_may_be_wider_than_the_heads(launch):
    arguments = (queries_and_keys(random, BF16), *tables("half", F32), [rotation("half", BF16)] * 2)
    assert_same_bits(run(launch, *arguments), rope_reference(*arguments))


def test_one_tensor_three_and_none(launch):
    cos, sin = tables("half", BF16)
    q, k = queries_and_keys(random, BF16)
    for xs, tokens in (([q], 5), ([q, k, q], 5), ([q, k], 0)):
        turns, some = [rotation("half", BF16)] * len(xs), slice(tokens)
        cut = [x[:, :, some] for x in xs], cos[:, :, some], sin[:, :, some], turns
        results = run(launch, *cut)
        assert layouts(results) == layouts(rope_fake(*cut))
        if tokens:
            assert_same_bits(results, rope_reference(*cut))


def test_heads_of_one_token_may_share_a_program(launch):
    """The launch of many tokens; it changes no bit."""
    from normfuse.ops.kernels.slots import HeadsLaunch

    cos, sin = tables("half", BF16)
    xs = [random(2, 5, 8, 64, dtype=BF16), random(2, 5, 4, 64, dtype=BF16)]
    cos, sin = cos.transpose(1, 2), sin.transpose(1, 2)
    turns = [rotation("half", BF16)] * 2
    tile = HeadsLaunch(elements=128, num_warps=1, groups=4, programs=1)
    results = run(launch, xs, cos, sin, turns, tile=tile)
    assert_same_bits(results, rope_reference(xs, cos, sin, turns))
