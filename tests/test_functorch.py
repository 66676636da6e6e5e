"""Norms beside and inside of the transforms of torch.func: compiled as without us, and reported."""

import pytest
import torch
from torch._C import _functorch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call, grad, jvp, vmap
from torch.fx import Graph
from torch.nn import functional as F

from normfuse.explain import explain_with
from normfuse.patterns.decline import Decline
from normfuse.patterns.mutation import Mutations
from normfuse.testing import capture

WIDTH = 16
RESIDUALS = torch.randn(2, 3, WIDTH, generator=torch.Generator().manual_seed(0))
WRAPPED = "its values are wrapped by {}, for which the op has no rule"
BY_VMAP, BY_GRAD = WRAPPED.format("torch.vmap"), WRAPPED.format("torch.func.grad, vjp or jvp")


# torch 2.13, on the first jvp: it compiles its decompositions by TorchScript.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")


def norm(h, weight):
    return unit(h) * weight


def unit(h):
    return h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)


def grown_in_place(v):
    y = v * 2
    y += 1
    return y


def batched_write(x, weight):
    return norm(vmap(grown_in_place)(x), weight)


def batched_write_to_an_item(x, weight):
    def first(v):
        y = torch.zeros_like(v)
        y[0] = v.sum()
        return y

    return norm(vmap(first)(x), weight)


def write_behind_vmap(x, weight):
    return norm(vmap(torch.sin)(x).add_(1), weight)


def write_under_grad(x, weight):
    return norm(grad(lambda v: grown_in_place(v).sin().sum())(x), weight)


def write_under_jvp(x, weight):
    return norm(jvp(grown_in_place, (x.sin(),), (x,))[1], weight)


def residual_in_vmap(x, weight):
    y = norm(x, weight)
    return vmap(lambda residual: residual + y)(RESIDUALS)


def rope_in_vmap(x, weight):
    y = norm(x, weight)
    half = torch.cat((-y[..., WIDTH // 2 :], y[..., : WIDTH // 2]), dim=-1)
    return vmap(lambda cos: y * cos + half * cos)(RESIDUALS)


def heads_in_grad(x, weight):
    y = norm(x, weight)
    return grad(lambda v: (y.transpose(0, 1) * v).sin().sum())(x.T.contiguous())


def same_for_every_batch(x, weight):
    return vmap(lambda residual: residual + norm(x, weight))(RESIDUALS)


BESIDE = [
    batched_write,
    batched_write_to_an_item,
    write_behind_vmap,
    write_under_grad,
    write_under_jvp,
    residual_in_vmap,
    rope_in_vmap,
    heads_in_grad,
    same_for_every_batch,
]


def inputs(requires_grad=False):
    torch.manual_seed(0)
    x, weight = torch.randn(3, WIDTH), torch.rand(WIDTH) + 0.5
    return x.requires_grad_(requires_grad), weight.requires_grad_(requires_grad)


def sites(block, *arguments):
    """The op of each site, or why there is none; the results are those of the unrewritten graph."""
    ours, plain = (capture(block, **options) for options in ({"lowering": "op"}, {"rules": []}))
    for mine, other in zip(flat(ours(*arguments)), flat(plain(*arguments)), strict=True):
        assert torch.equal(mine, other)
    report = explain_with(block, arguments, options={"normfuse.lowering": "op"})
    return [site.op or site.reason for site in report.sites]


def flat(value):
    return value if isinstance(value, tuple) else (value,)


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("block", BESIDE, ids=lambda block: block.__name__)
def test_norms_beside_a_transform_are_fused(block, training):
    assert sites(block, *inputs(training)) == ["rms_norm"]


def norm_in_vmap(x, weight):
    return vmap(lambda v: norm(v, weight))(x)


def call_in_vmap(x, weight):
    return vmap(lambda v: F.rms_norm(v, (WIDTH,), weight))(x)


def weights_in_vmap(x, weight):
    return vmap(lambda w: F.rms_norm(x, (WIDTH,), w))(torch.stack((weight, weight + 1)))


def eps_in_vmap(x, weight):
    variance = x.pow(2).mean(-1, keepdim=True)
    return vmap(lambda eps: x * torch.rsqrt(variance + eps))(torch.tensor([1e-6, 1e-5]))


def norm_in_grad(x, weight):
    return grad(lambda v: norm(v, weight).sin().sum())(x)


def norm_of_a_constant_in_grad(x, weight):
    return grad(lambda w: F.rms_norm(x, (WIDTH,), w).sin().sum())(weight)


def norm_in_jvp(x, weight):
    return jvp(lambda v: norm(v, weight), (x,), (torch.ones_like(x),))[1]


def norm_of_each_sample(x, weight):
    return vmap(grad(lambda w, v: norm(v, w).sin().sum()), in_dims=(None, 0))(weight, x)


def write_and_norm_in_vmap(x, weight):
    return vmap(lambda v: norm(grown_in_place(v), weight))(x)


INSIDE = {
    norm_in_vmap: BY_VMAP,
    call_in_vmap: BY_VMAP,
    weights_in_vmap: BY_VMAP,
    eps_in_vmap: BY_VMAP,
    norm_in_grad: BY_GRAD,
    norm_of_a_constant_in_grad: BY_GRAD,
    norm_in_jvp: BY_GRAD,
    norm_of_each_sample: BY_GRAD,
    write_and_norm_in_vmap: BY_VMAP,
}


@pytest.mark.parametrize("block", INSIDE, ids=lambda block: block.__name__)
def test_norms_inside_a_transform_are_declined_before_autograd(block):
    assert sites(block, *inputs(requires_grad=True)) == [INSIDE[block]]


@pytest.mark.parametrize("block", [norm_in_vmap, call_in_vmap, write_and_norm_in_vmap])
def test_in_inference_a_batched_norm_is_one_norm_after_autograd(block):
    with torch.no_grad():
        assert sites(block, *inputs()) == ["rms_norm"]


@pytest.mark.parametrize("block", [*BESIDE, *INSIDE], ids=lambda block: block.__name__)
def test_all_of_them_compile_to_code_that_agrees_with_eager(block):
    """Through Inductor itself, in the lowering that gives it its own operations back."""
    x, weight = inputs(requires_grad=True)
    compiled = torch.compile(block, backend="normfuse", options={"normfuse.lowering": "inline"})
    torch.testing.assert_close(compiled(x, weight), block(x, weight))


def test_a_module_with_stacked_weights():
    module = torch.nn.RMSNorm(WIDTH)
    weights = torch.rand(2, WIDTH)

    def ensemble(x):
        return vmap(lambda w: functional_call(module, {"weight": w}, (x,)))(weights)

    with torch.no_grad():
        assert sites(ensemble, inputs()[0]) == ["rms_norm"]


def test_a_value_that_vmap_writes_to_is_not_read_afterwards():
    def written_between(x, weight):
        h = x * 2
        variance = h.pow(2).mean(-1, keepdim=True)
        vmap(lambda v: v.mul_(3))(h)
        return h * torch.rsqrt(variance + 1e-6) * weight, h

    with torch.no_grad():
        (reason,) = sites(written_between, *inputs())
    assert reason == "the inverse root multiplies another value than the one that was squared"


def test_a_weight_that_leaves_grad_behind_the_sum_is_no_reason_to_move_the_op_there():
    def inner_step(x, weight):
        return unit(x + x.sin()) * grad(lambda w: w.sin().sum())(weight)

    assert sites(inner_step, *inputs(requires_grad=True)) == ["rms_norm"]


def test_a_write_to_memory_that_cannot_be_told_may_be_to_any():
    graph = Graph()
    values = {name: graph.placeholder(name) for name in ("x", "hidden")}
    first = graph.call_method("float", (values["x"],))
    write = graph.call_method("add_", (values["hidden"], 1))
    last = graph.call_method("sin", (first,))
    with FakeTensorMode():
        x, hidden = torch.empty(2), _functorch._wrap_functional_tensor(torch.empty(2), 1)
    for node in (values["x"], first, last):
        node.meta["example_value"] = x
    for node in (values["hidden"], write):
        node.meta["example_value"] = hidden
    with pytest.raises(Decline) as decline:
        Mutations(graph).forbid_between((first, last))
    assert str(decline.value) == (
        "a value that it reads may be changed in place by `add_` on the way"
    )
