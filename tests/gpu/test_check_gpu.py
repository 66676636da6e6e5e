"""Checks of real kernels: in eager calls, between Inductor's CUDA graphs, and in a captured one."""

import pytest
import torch

import normfuse
from normfuse.ops.checking import compare
from normfuse.ops.lowering import ALL_OPS, inline_form, kernel_form
from tests import op_arguments
from tests.weight_updates import norms_and_input

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def no_checks_yet():
    normfuse.reset_checks()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("op", ALL_OPS, ids=str)
def test_every_kernel_stays_within_its_bounds(op, dtype):
    from normfuse.ops.kernels.tile import eager

    with torch.device("cuda"):
        arguments = op_arguments.of(op, dtype)

    used = (True,) * len(inline_form(op)(*arguments))
    results = list(kernel_form(op, used, eager)(*arguments))

    assert compare(op, arguments, results).worst is None


@torch.no_grad()
@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_kernels_are_checked_also_between_cuda_graphs(mode):
    model, x = norms_and_input("cuda")
    options = normfuse.options(mode, lowering="triton", check="all")
    compiled = torch.compile(model, options=options, dynamic=False)

    for _ in range(6):  # warm-up, recording, replay
        compiled(x)

    sites = normfuse.check_report().sites
    assert sites
    assert all((site.num_checked, site.num_beyond) == (6, 0) for site in sites)


@torch.no_grad()
def test_a_captured_graph_is_not_checked_and_the_report_says_so():
    model, x = norms_and_input("cuda")
    compiled = torch.compile(model, options=normfuse.options(lowering="triton", check="all"))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        compiled(x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()

    with torch.cuda.graph(graph):
        compiled(x)
    graph.replay()

    for site in normfuse.check_report().sites:
        assert (site.num_calls, site.num_checked) == (2, 1)
        assert site.not_checked.startswith("a CUDA graph was being captured")
