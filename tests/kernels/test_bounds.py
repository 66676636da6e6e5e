"""Every kernel, interpreted, against the bounds that checks hold it to."""

import pytest
import torch

from normfuse.ops.checking import compare
from normfuse.ops.lowering import ALL_OPS
from normfuse.ops.rounding import RoundingPlan
from tests import op_arguments
from tests.kernels import interpreted


@pytest.mark.guarantee
@pytest.mark.parametrize("op", ALL_OPS, ids=str)
@pytest.mark.parametrize(
    ("dtype", "plan"),
    [(torch.bfloat16, RoundingPlan.before_weight), (torch.float32, RoundingPlan.once)],
    ids=["bfloat16", "float32"],
)
def test_every_kernel_stays_within_its_bounds(interpreter, op, dtype, plan):
    arguments = op_arguments.of(op, dtype, plan)
    name = op._schema.name.partition("::")[2]

    results = interpreter.submit(interpreted.kernel_form, name, arguments).result()

    found = compare(op, arguments, results)
    assert found.worst is None
    assert 0 < found.inline_error <= 1
