"""Weights that change under CUDA graphs: Inductor's own and one that the user has recorded."""

import pytest
import torch

import normfuse
from tests.float64 import assert_as_close_as_eager
from tests.weight_updates import (
    ELSEWHERE,
    IN_PLACE,
    RECOMPILED,
    Norms,
    change_the_type,
    data_copy,
    norms_and_input,
    torch_notices_types,
)

pytestmark = pytest.mark.gpu

EVERY_UPDATE = [
    *[(Norms, update) for update in (*IN_PLACE, *ELSEWHERE)],
    *RECOMPILED,
]


def names(value):
    return value.__name__


def assert_right(y, model, x):
    with torch.no_grad():
        assert_as_close_as_eager(y, model(x), model.exact(x))


def compiled_with_kernels(model, mode=None):
    return torch.compile(model, options=normfuse.options(mode, lowering="triton"), dynamic=False)


@pytest.mark.guarantee
@torch.no_grad()
@pytest.mark.parametrize(("model_class", "update"), EVERY_UPDATE, ids=names)
def test_the_cuda_graphs_of_inductor_see_new_weights(model_class, update):
    if update is change_the_type and not torch_notices_types():
        pytest.skip("this torch runs the code of the old type, with us and without")
    model, x = norms_and_input("cuda", model_class)
    compiled = compiled_with_kernels(model, "reduce-overhead")
    for _ in range(4):  # warm-up, recording, replay
        before = compiled(x).clone()

    with torch.enable_grad():
        update(model)
    for _ in range(4):
        after = compiled(x).clone()
        assert_right(after, model, x)

    assert not torch.equal(after, before)


@pytest.mark.guarantee
@torch.no_grad()
def test_a_recorded_cuda_graph_sees_new_weights_at_their_addresses():
    model, x = norms_and_input("cuda")
    compiled = compiled_with_kernels(model)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            compiled(x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = compiled(x)

    for update in IN_PLACE:
        graph.replay()
        before = y.clone()
        with torch.enable_grad():
            update(model)
        graph.replay()
        assert not torch.equal(y, before), update.__name__
        assert_right(y, model, x)


@pytest.mark.guarantee
@torch.no_grad()
@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_a_model_may_move_between_devices(mode):
    model, x = norms_and_input("cuda")
    compiled = compiled_with_kernels(model, mode)

    for device in ("cuda", "cpu", "cuda", "cpu"):
        model.to(device)
        for _ in range(3):
            data_copy(model)
            assert_right(compiled(x.to(device)).clone(), model, x.to(device))
