"""Gradients written over those that they are made from, interpreted."""

from importlib import import_module

import pytest
import torch

from normfuse.ops import lowering
from tests import op_arguments
from tests.kernels import interpreted
from tests.kernels.inputs import BF16, F32, assert_same_bits

over = pytest.importorskip("tests.kernels.over_gradients")

# Gates and modulations learn as well, and have results of other shapes.
WITHOUT = ("gated_rms_norm_backward", "modulated_rms_norm_backward")
NAMES = [op._schema.name.partition("::")[2] for op in lowering.ALL_OPS]
BACKWARDS = [name for name in NAMES if name.endswith("_backward") and name not in WITHOUT]


@pytest.mark.guarantee
@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("name", BACKWARDS)
def test_results_are_the_same_in_the_place_of_gradients(interpreter, name, dtype):
    torch.manual_seed(0)
    arguments = op_arguments.of(getattr(torch.ops.normfuse, name).default, dtype)
    expected = interpreter.submit(interpreted.kernel_form, name, arguments).result()

    results = interpreter.submit(interpreted.kernel_form, name, arguments, over.Over).result()

    assert_same_bits(results, expected)


def test_the_places_are_arguments_of_kernels():
    for kernel, places in over.PLACES.items():
        stem = kernel.removesuffix("_kernel")
        found = getattr(import_module(f"normfuse.ops.kernels.{stem}"), kernel)
        assert {*places, *sum(places.values(), ())} <= set(found.arg_names)
