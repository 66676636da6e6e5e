"""The kernel of `qk_rms_norm` and `qk_rms_norm_rope`, interpreted: rows, rotations, roundings."""

import pytest
import torch

from normfuse.ops.qk_rms_norm import qk_rms_norm_fake, qk_rms_norm_reference
from normfuse.ops.qk_rms_norm_rope import qk_rms_norm_rope_fake, qk_rms_norm_rope_reference
from normfuse.ops.rms_norms import weight_of_each
from normfuse.ops.rotation import Rotation
from normfuse.ops.rounding import RoundingPlan
from tests import float64
from tests.kernels.inputs import (
    BF16,
    F16,
    F32,
    F64,
    PLANS,
    VIEWS,
    assert_same_bits,
    gemma,
    integers,
    layouts,
    llama,
    random,
)

EPS = 1e-6
SHORT = {BF16: "bf16", F16: "f16", F32: "f32", F64: "f64"}

# Rows of 64 columns: (rotation, columns of the tables).
ROTATIONS = {
    "half": ("half 64", 64),
    "half, one angle a pair": ("half 64", 32),
    "interleaved": ("interleaved 64", 64),
    "interleaved, one angle a pair": ("interleaved 64", 32),
    "complex": ("complex 64", 32),
    "partial": ("half 32", 32),
    "partial, odd sizes": ("interleaved 22", 11),
    "the last columns": ("half 24 at=40", 24),
    "in the middle": ("half 16 at=8", 16),
}


def rotation(name, dtype, *, contiguous=False):
    text, _ = ROTATIONS[name]
    wide = F32 if "complex" in name and dtype != F64 else dtype
    layout = " contiguous" if contiguous else ""
    return f"{text} in={SHORT[wide]} out={SHORT[dtype]}{layout}"


def tables(name, dtype, *, tokens=5):
    """cos and sin (2, 1, tokens, columns), as views of (2, tokens, 1, columns)."""
    dtype = F32 if "complex" in name and dtype != F64 else dtype
    return tuple(
        random(2, tokens, 1, ROTATIONS[name][1], dtype=dtype).transpose(1, 2) for _ in range(2)
    )


def queries_and_keys(make, dtype):
    """q, heads first, and k, heads first in a packed projection."""
    q = make(2, 5, 4, 64, dtype=dtype).transpose(1, 2)
    return [q, make(2, 5, 9, 64, dtype=dtype)[:, :, 3:6].transpose(1, 2)]


def run(launch, arguments, **keywords):
    """The launcher with the arguments of the op."""
    xs, weights, *rest = arguments
    *tensors, eps, offsets, plans = rest if len(rest) < 5 else rest[:-1]
    turns = [[Rotation.parse(text) for text in rest[-1]]] if len(rest) > 4 else []
    parsed = [RoundingPlan.parse(plan) for plan in plans]
    stem = "qk_rms_norm_rope" if turns else "qk_rms_norm"
    norms = (*tensors, eps, offsets, parsed, *turns)
    return launch(stem, xs, weight_of_each(weights, plans), *norms, **keywords)


@pytest.mark.parametrize("name", ROTATIONS)
@pytest.mark.parametrize("dtype", [BF16, F16, F32, F64])
def test_every_rotation_has_eagers_bits(launch, dtype, name):
    xs = queries_and_keys(integers, dtype)
    plans = [str(llama(dtype)), str(RoundingPlan.once(dtype, dtype))]
    turns = [rotation(name, dtype), rotation(name, dtype, contiguous=True)]
    weights = [random(64, dtype=dtype), random(64, dtype=dtype)]
    arguments = (xs, weights, *tables(name, dtype), [0.0] * 2, [0.0, 1.0], plans, turns)

    results = run(launch, arguments)

    assert_same_bits(results, qk_rms_norm_rope_reference(*arguments))
    assert layouts(results) == layouts(qk_rms_norm_rope_fake(*arguments))


@pytest.mark.parametrize("name", ["half", "interleaved", "complex", "partial, odd sizes"])
@pytest.mark.parametrize("dtype", [BF16, F16, F32])
def test_errs_no_more_than_eager(launch, dtype, name):
    xs, weights = queries_and_keys(random, dtype), [random(64, dtype=dtype) for _ in range(2)]
    plans, turns = [str(gemma(dtype))] * 2, [rotation(name, dtype)] * 2
    numbers = ([EPS] * 2, [1.0] * 2)
    arguments = (xs, weights, *tables(name, dtype), *numbers, plans, turns)

    results = run(launch, arguments)

    eager = qk_rms_norm_rope_reference(*arguments)
    exact = float64.qk_rms_norm_rope(*arguments)
    for result, other, truth in zip(results[:2], eager, exact, strict=False):
        float64.assert_as_close_as_eager(result, other, truth)


def test_tables_may_be_wider_than_the_heads(launch):
    """float32 tables: eager forms the products in float32, and rounds where the model casts."""
    xs, plans = queries_and_keys(integers, BF16), [str(llama(BF16))] * 2
    weights, turns = [random(64), random(64)], ["half 64 in=bf16 out=bf16"] * 2
    arguments = (xs, weights, *tables("half", F32), [0.0] * 2, [0.0] * 2, plans, turns)

    assert_same_bits(run(launch, arguments), qk_rms_norm_rope_reference(*arguments))


def test_a_value_beside_them_does_not_turn(launch):
    xs = [*queries_and_keys(integers, BF16), integers(2, 5, 3, 40)]
    plans = [str(llama(BF16))] * 2 + [str(RoundingPlan.once(BF16, None))]
    turns = [rotation("half", BF16)] * 2 + ["none"]
    numbers = ([0.0] * 3, [0.0] * 3)
    arguments = (xs, [random(64), random(64)], *tables("half", BF16), *numbers, plans, turns)

    assert_same_bits(run(launch, arguments), qk_rms_norm_rope_reference(*arguments))


def test_tables_may_serve_the_whole_batch(launch):
    cos, sin = (random(1, 1, 5, 64) for _ in range(2))
    xs, plans = queries_and_keys(integers, BF16), [str(llama(BF16))] * 2
    turns, numbers = [rotation("half", BF16)] * 2, ([0.0] * 2, [0.0] * 2)
    arguments = (xs, [random(64), random(64)], cos, sin, *numbers, plans, turns)

    assert_same_bits(run(launch, arguments), qk_rms_norm_rope_reference(*arguments))


@pytest.mark.parametrize("view", [name for name in VIEWS if name != "four strides"])
def test_takes_rows_of_any_strides(launch, view):
    """Strides of four levels are declined before a launch."""
    xs = [VIEWS[view](), random(3, 24)]
    plans = [str(RoundingPlan.once(BF16, BF16)), str(RoundingPlan.once(BF16, None))]
    arguments = (xs, [random(64)], [EPS] * 2, [1.0, 0.0], plans)

    results = run(launch, arguments)

    assert layouts(results) == layouts(qk_rms_norm_fake(*arguments))
    eager = qk_rms_norm_reference(*arguments)
    exact = float64.rms_norm(xs[0], arguments[1][0], EPS, 1.0)
    float64.assert_as_close_as_eager(results[0], eager[0], exact)


@pytest.mark.parametrize("plan", PLANS)
def test_every_rounding_of_the_plan_has_eagers_bits(launch, plan):
    steps = RoundingPlan.parse(plan)
    xs = [integers(4, 64, dtype=steps.unit[-1]), integers(4, 128, dtype=steps.unit[-1])]
    dtype = steps.weight and steps.weight[1]
    weights = [random(x.shape[-1], dtype=dtype) for x in xs] if dtype else []
    arguments = (xs, weights, [0.0] * 2, [1.0] * 2, [plan] * 2)

    assert_same_bits(run(launch, arguments), qk_rms_norm_reference(*arguments))


@pytest.mark.parametrize("widths", [(1, 3), (64, 4096), (769, 16), (5377, 512)])
def test_widths_may_differ(launch, widths):
    xs, weights = [random(5, width) for width in widths], [random(width) for width in widths]
    plans = [str(gemma(BF16))] * 2
    results = run(launch, (xs, weights, [EPS] * 2, [1.0] * 2, plans))

    eager = qk_rms_norm_reference(xs, weights, [EPS] * 2, [1.0] * 2, plans)
    for index, (x, weight) in enumerate(zip(xs, weights, strict=True)):
        exact = float64.rms_norm(x, weight, EPS, 1.0)
        float64.assert_as_close_as_eager(results[index], eager[index], exact)


def test_an_empty_tensor_beside_a_full_one(launch):
    xs, plans = [random(0, 64), integers(3, 64)], [str(llama(BF16))] * 2
    arguments = (xs, [random(64), random(64)], [0.0] * 2, [0.0] * 2, plans)

    results = run(launch, arguments)

    assert layouts(results) == layouts(qk_rms_norm_fake(*arguments))
    assert torch.equal(results[1], qk_rms_norm_reference(*arguments)[1])


def test_stores_only_what_is_wanted(launch):
    xs, plans = [integers(3, 64), integers(3, 64)], [str(llama(BF16))] * 2
    arguments = (xs, [random(64), random(64)], [0.0] * 2, [0.0] * 2, plans)

    results = run(launch, arguments, stores=(True, True, False, True))

    assert [result is None for result in results] == [False, False, True, False]
    assert_same_bits(results, qk_rms_norm_reference(*arguments))


def test_a_rows_bits_do_not_depend_on_the_others(launch):
    q, k = random(37, 64), random(5, 64)
    plans, weights = [str(gemma(BF16))] * 2, [random(64), random(64)]

    def normalised(q):
        return run(launch, ([q, k], weights, [EPS] * 2, [1.0] * 2, plans))[0]

    whole = normalised(q)
    for rows in (slice(0, 1), slice(3, 20), slice(30, 37)):
        assert torch.equal(normalised(q[rows]), whole[rows])


def heads_launch(elements, groups, programs=0):
    slots = pytest.importorskip("normfuse.ops.kernels.slots")
    return slots.HeadsLaunch(elements, num_warps=1, groups=groups, programs=programs)


@pytest.mark.parametrize("name", ROTATIONS)
def test_how_many_tiles_a_program_takes_changes_no_bit(launch, name):
    packed = random(2, 5, 14, 64, dtype=BF16)
    xs = [packed[:, :, part].transpose(1, 2) for part in (slice(8), slice(8, 12), slice(12, 13))]
    plans, weights = [str(gemma(BF16))] * 3, [random(64) for _ in xs]
    turns = [rotation(name, BF16)] * 2 + ["none"]
    arguments = (xs, weights, *tables(name, BF16), [EPS] * 3, [1.0] * 3, plans, turns)
    one = run(launch, arguments, tile=heads_launch(128, 1))

    for groups in (2, 4):
        assert_same_bits(run(launch, arguments, tile=heads_launch(128, groups)), one)


@pytest.mark.parametrize(
    ("shape", "table", "programs", "groups"),
    [
        ((1, 4096, 32, 128), (1, 1, 4096, 128), 2048, 4),
        ((1, 512, 32, 128), (1, 1, 512, 128), 2048, 2),  # 4 would leave 1024 programs
        ((1, 64, 32, 128), (1, 1, 64, 128), 2048, 1),
        ((1, 4096, 12, 128), (1, 1, 4096, 128), 0, 1),  # 12 heads are no multiple of 2 x 4
        ((3, 4096, 8, 128), (1, 1, 4096, 128), 0, 2),
        ((1, 4096, 8, 128), (1, 8, 4096, 128), 0, 1),  # angles for every head
    ],
)
def test_several_tiles_stay_among_heads_that_turn_alike(shape, table, programs, groups):
    slots = pytest.importorskip("normfuse.ops.kernels.slots")
    x = torch.empty(shape, dtype=BF16, device="meta").transpose(1, 2)
    angles = (torch.empty(table, dtype=BF16, device="meta"),) * 2
    tile = heads_launch(512, 4, programs)
    norm = (EPS, 0.0, llama(BF16))
    slot = slots.Slot.of(
        x, None, angles, norm, Rotation("half", 128, BF16, BF16), tile=tile, store_rstd=False
    )

    assert slot.constants["GROUPS"] == groups
    assert slot.num_tiles * 4 * groups == x.numel() // 128


def test_symbolic_rows_are_as_many_as_were_traced():
    from torch._dynamo.source import ConstantSource
    from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

    rows = pytest.importorskip("normfuse.ops.kernels.rows")
    tile = heads_launch(512, 4, programs=2048)
    environment = ShapeEnv()

    def traced(number):
        source = ConstantSource(f"tokens_{number}")
        symbol = environment.create_symbol(number, source, dynamic_dim=DimDynamic.DYNAMIC)
        return environment.create_symintnode(symbol, hint=number, source=source)

    heads = rows.Neighbours(32, 128, share_table=True)
    assert tile.groups_of(4, traced(4096) * 32, heads) == 4
    assert tile.groups_of(4, traced(64) * 32, heads) == 1
    assert tile.groups_of(4, environment.create_unbacked_symint() * 32, heads) == 1
    assert not environment.guards
