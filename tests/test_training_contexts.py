"""Training as people do it: frozen weights, checkpoints, autocast, accumulation, islands, ties."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import normfuse
from normfuse.ops import ADD_RMS_NORM, RMS_NORM, RoundingPlan
from normfuse.ops.add_rms_norm_backward import ADD_RMS_NORM_BACKWARD
from normfuse.ops.dual_rms_norm_add_backward import DUAL_RMS_NORM_ADD_BACKWARD
from normfuse.ops.dual_rms_norm_add_rms_norm_backward import DUAL_RMS_NORM_ADD_RMS_NORM_BACKWARD
from normfuse.ops.qk_rms_norm_rope_backward import QK_RMS_NORM_ROPE_BACKWARD
from normfuse.ops.rms_norm_add_backward import RMS_NORM_ADD_BACKWARD
from normfuse.ops.rms_norm_add_rms_norm_backward import RMS_NORM_ADD_RMS_NORM_BACKWARD
from normfuse.ops.rms_norm_backward import RMS_NORM_BACKWARD
from normfuse.ops.rms_norms_backward import RMS_NORMS_BACKWARD
from normfuse.passes.recognise import Recognise, is_op
from normfuse.settings import Settings
from normfuse.testing import capture
from tests.blocks import GemmaBlock, LlamaBlock, activation
from tests.kernels.backward import rstd_of
from tests.weight_updates import Norms

BF16 = torch.bfloat16
PLAN = str(RoundingPlan.once(BF16, BF16))


def captured(function):
    """The rewritten graphs, forward and backward, run node by node."""
    return capture(function, lowering="op")


def step(function, parameters, *inputs):
    """The gradients of the inputs and parameters that want one."""
    leaves = [t for t in (*inputs, *parameters) if t.requires_grad]
    torch.manual_seed(1)
    result = function(*inputs)
    return torch.autograd.grad(result, leaves, torch.randn_like(result), allow_unused=True)


def assert_close(ours, eager):
    """In float32, where the sums run in another order: a few roundings of the largest value."""
    for one, other in zip(ours, eager, strict=True):
        assert (one is None) == (other is None)
        if other is not None:
            assert (one - other).abs().max() <= 16 * torch.finfo(
                torch.float32
            ).eps * other.abs().max()


def inputs_of(*, grad=True):
    return [activation(16).float().requires_grad_(grad) for _ in range(2)]


def assert_trains_like_eager(block, *inputs):
    parameters = list(block.parameters())
    assert_close(step(captured(block), parameters, *inputs), step(block, parameters, *inputs))


@pytest.mark.guarantee
def test_a_frozen_weight_gets_no_gradient():
    block, seen = LlamaBlock(), []
    block.norm.weight.requires_grad_(False)
    x, residual = inputs_of()
    with Seen(seen):
        y, _ = normfuse.add_rms_norm(x, residual, block.norm.weight)
        y.sum().backward()

    ((_, mask),) = [(op, arguments[-1]) for op, arguments in seen]
    assert mask == [True, False, False]
    assert_trains_like_eager(block, *inputs_of())


@pytest.mark.guarantee
def test_an_input_without_a_gradient_gets_none():
    x, weight, seen = activation(16).float(), torch.rand(8, requires_grad=True), []
    with Seen(seen):
        normfuse.rms_norm(x, weight).sum().backward()

    assert [arguments[-1] for _, arguments in seen] == [[False, True]]
    assert_trains_like_eager(GemmaBlock(), *inputs_of(grad=False))


class Seen(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes the gradient ops that run, with their arguments."""

    def __init__(self, calls):
        super().__init__()
        self.calls = calls

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "normfuse" and "backward" in function.__name__:
            self.calls.append((function, args))
        return function(*args, **(kwargs or {}))


def policy(context, op, *args, **kwargs):
    is_product = op in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
    return CheckpointPolicy.MUST_SAVE if is_product else CheckpointPolicy.PREFER_RECOMPUTE


@pytest.mark.guarantee
@pytest.mark.parametrize("is_selective", [False, True])
@pytest.mark.parametrize("block_class", [LlamaBlock, GemmaBlock])
def test_activation_checkpointing(block_class, is_selective):
    block = block_class()

    def contexts():
        return create_selective_checkpoint_contexts(policy)

    settings = {"context_fn": contexts} if is_selective else {}

    def checkpointed(x, residual):
        return checkpoint(block, x, residual, use_reentrant=False, **settings)

    inputs, parameters = inputs_of(), list(block.parameters())
    ours = step(captured(checkpointed), parameters, *inputs)
    assert_close(ours, step(block, parameters, *inputs))


@pytest.mark.guarantee
@pytest.mark.parametrize("dtype", [BF16, torch.float16])
@pytest.mark.parametrize("block_class", [LlamaBlock, GemmaBlock])
def test_autocast(block_class, dtype):
    block, inputs = block_class(), inputs_of()

    def half(x, residual):
        with torch.autocast("cpu", dtype):
            return block(x, residual).float()

    assert torch.equal(captured(half)(*inputs), half(*inputs))
    ours, eager = (step(f, block.parameters(), *inputs) for f in (captured(half), half))
    assert_as_close_as_eager(ours, eager, step(block, block.parameters(), *inputs), dtype)


def assert_as_close_as_eager(ours, eager, exact, dtype):
    """Twice eager's own error, and a rounding to the type of autocast."""
    for one, other, truth in zip(ours, eager, exact, strict=True):
        allowed = 2 * (other - truth).abs().max() + torch.finfo(dtype).eps * truth.abs().max()
        assert (one - truth).abs().max() <= allowed


def test_autocast_of_a_gpu_may_cast_what_the_call_of_a_norm_reads():
    """On CUDA its list of operations in float32 has `rms_norm`; here such a graph is made up."""
    graph, mode = torch.fx.Graph(), FakeTensorMode()
    x, weight = graph.placeholder("x"), graph.placeholder("weight")
    y = graph.call_function(torch.nn.functional.rms_norm, (x, (8,), weight, 1e-6))
    graph.output(y)
    with mode:
        x.meta["example_value"] = torch.empty(4, 8, dtype=torch.float16)
        weight.meta["example_value"] = torch.empty(8)
        y.meta["example_value"] = torch.empty(4, 8)

    Recognise("example_value", Settings.of(lowering="op"))(graph)

    (op,) = (node for node in graph.nodes if is_op(node))
    assert op.args[-1] == "f32 unit=f32 weight=f32 out=f32"
    half, scale = activation(4).half(), torch.rand(8)
    eager = torch.nn.functional.rms_norm(half.float(), (8,), scale, 1e-6)
    assert torch.equal(op.target(half, scale, *op.args[2:])[0], eager)


@pytest.mark.guarantee
def test_a_scaled_loss():
    """float16 under autocast, with the gradients that a scaler gives back to the optimizer."""
    block, inputs = GemmaBlock(), inputs_of()

    def unscaled(function):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
        optimizer = torch.optim.SGD(block.parameters(), lr=0.1)
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = function(*inputs).float().square().mean()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        return [p.grad for p in block.parameters()]

    def exact(x, residual):
        with torch.autocast("cpu", enabled=False):
            return block(x, residual)

    ours, eager = unscaled(captured(block)), unscaled(block)
    assert_as_close_as_eager(ours, eager, unscaled(exact), torch.float16)


@pytest.mark.guarantee
def test_gradients_accumulate():
    block = GemmaBlock()
    eager = [p.grad for p in accumulated(block, block)]

    ours = [p.grad for p in accumulated(block, captured(block))]

    assert_close(ours, eager)


def accumulated(block, function):
    block.zero_grad(set_to_none=True)
    for seed in range(2):
        torch.manual_seed(seed)
        function(*inputs_of()).square().mean().backward()
    return list(block.parameters())


@pytest.mark.guarantee
def test_an_island_without_gradients():
    block, frozen = LlamaBlock(), GemmaBlock()

    def both(x, residual):
        with torch.no_grad():
            residual = frozen(x, residual)
        return block(x, residual)

    inputs, parameters = inputs_of(), [*block.parameters(), *frozen.parameters()]
    assert_close(step(captured(both), parameters, *inputs), step(both, parameters, *inputs))


@pytest.mark.guarantee
def test_functional_call():
    block, inputs = GemmaBlock(), inputs_of()
    parameters = {n: p.detach().clone().requires_grad_() for n, p in block.named_parameters()}

    def call(x, residual):
        return torch.func.functional_call(block, parameters, (x, residual))

    leaves = list(parameters.values())
    assert_close(step(captured(call), leaves, *inputs), step(call, leaves, *inputs))


@pytest.mark.guarantee
def test_tied_norms_add_up_their_gradients():
    first, second = GemmaBlock(), GemmaBlock()
    second.pre_feedforward_layernorm = first.pre_feedforward_layernorm
    stack = nn.ModuleList([first, second])

    def both(x, residual):
        return second(x, first(x, residual))

    inputs, parameters = inputs_of(), list(stack.parameters())
    assert_close(step(captured(both), parameters, *inputs), step(both, parameters, *inputs))


@pytest.mark.guarantee
def test_one_weight_in_two_norms():
    block, other = LlamaBlock(), LlamaBlock()
    other.norm.weight = block.norm.weight

    def both(x, residual):
        return other(x, block(x, residual))

    inputs, parameters = inputs_of(), [*block.parameters(), other.branch.weight]
    assert_close(step(captured(both), parameters, *inputs), step(both, parameters, *inputs))


@pytest.mark.guarantee
def test_adapters_learn_and_nothing_else():
    """LoRA: of the norms only the inputs get gradients."""
    model = Norms()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora" in name)
    x = torch.randn(16, model.llama.weight.numel())

    ours = step(captured(model), list(model.parameters()), x)

    assert_close(ours, step(model, list(model.parameters()), x))


@pytest.mark.guarantee
@pytest.mark.filterwarnings("ignore:.*compiled.autograd:UserWarning")
def test_compiled_autograd():
    """Dynamo captures the backward as well, and gives it to the backend as a graph of its own."""
    block, inputs = GemmaBlock(), inputs_of()
    eager = step(block, block.parameters(), *inputs)

    with torch._dynamo.compiled_autograd._enable(captured):
        ours = step(captured(block), block.parameters(), *inputs)

    assert_close(ours, eager)


@pytest.mark.guarantee
def test_the_same_bits_twice():
    block, inputs = GemmaBlock().bfloat16(), [t.bfloat16() for t in inputs_of()]
    inputs = [t.detach().requires_grad_() for t in inputs]
    model = captured(block)

    first, second = (step(model, block.parameters(), *inputs) for _ in range(2))

    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))


@pytest.mark.guarantee
def test_gradients_of_gradients():
    x, residual, weight = (
        torch.randn(*shape, dtype=torch.double, requires_grad=True)
        for shape in ((3, 5), (3, 5), (5,))
    )
    plan = str(RoundingPlan.once(torch.double, torch.double))

    def norm(x, weight):
        return RMS_NORM(x, weight, None, 1e-3, 1.0, plan)[0]

    def add(x, residual, weight):
        return ADD_RMS_NORM(x, residual, weight, None, None, 0.5, None, 1e-3, 0.0, plan)[:2]

    assert torch.autograd.gradgradcheck(norm, (x, weight))
    assert torch.autograd.gradgradcheck(add, (x, residual, weight))


def test_a_gradient_op_is_not_differentiated_in_silence():
    x = activation(4).requires_grad_()
    grad_x, _ = RMS_NORM_BACKWARD(x, x, None, rstd_of(x.detach()), 0.0, PLAN, [True, False])

    with pytest.raises(NotImplementedError, match="rms_norm_backward must not be differentiated"):
        grad_x.sum().backward()


def gradient_ops():
    """Each with arguments of several types and layouts."""
    x, wide, weight = activation(6), activation(6).float(), activation(1)[0]
    turned = activation(6).view(2, 3, 8).transpose(0, 1)
    rstd = rstd_of(x)
    none = (None, None, None, None)
    scales = (torch.tensor([0.5]), torch.tensor(0.3), 0.2, 0.7)
    both, all_three = [True, True], [True, True, True]
    yield RMS_NORM_BACKWARD, (x, wide, weight, rstd, 1.0, PLAN, both)
    yield RMS_NORM_BACKWARD, (turned.contiguous(), turned, weight, rstd_of(turned), 1.0, PLAN, both)
    yield RMS_NORM_BACKWARD, (x, x, None, rstd, 0.0, PLAN, [True, False])
    rest = (1.0, PLAN, BF16, torch.float32, all_three)
    yield ADD_RMS_NORM_BACKWARD, (x, x, x, weight, rstd, *scales, *rest)
    yield ADD_RMS_NORM_BACKWARD, (x, None, x, weight, rstd, *none, *rest[:-1], [True, False, True])
    yield RMS_NORM_ADD_BACKWARD, (x, wide, weight, rstd, *scales, 1.0, PLAN, BF16, all_three)
    norms = (1.0, PLAN, 0.0, PLAN, BF16)
    weights = (weight, weight, rstd, rstd)
    yield (
        RMS_NORM_ADD_RMS_NORM_BACKWARD,
        (x, None, x, wide, *weights, *scales, *norms, [True, False, True, True]),
    )
    lists = ([x, wide], [weight], rstd, [1.0, 0.0], [1.0, 0.5])
    weightless = str(RoundingPlan.once(BF16, None))
    yield RMS_NORMS_BACKWARD, (wide, *lists, [PLAN, weightless], both)
    yield RMS_NORMS_BACKWARD, (wide, *lists, [weightless, PLAN], [False, True])
    plans = [PLAN, weightless, PLAN, PLAN]
    norms = ([weight] * 2, [rstd] * 3, *scales, [1.0] * 3, plans[:3], torch.float32)
    mask = [True, True, True, True, False, True]
    yield DUAL_RMS_NORM_ADD_BACKWARD, (x, x, wide, *norms, mask)
    norms = ([weight] * 3, [rstd] * 4, *none, [0.0] * 4, plans, BF16)
    yield (
        DUAL_RMS_NORM_ADD_RMS_NORM_BACKWARD,
        (x, None, x, wide, wide, *norms, [True, False, True, False, False, True, True]),
    )
    turn, table = "half 8 in=bf16 out=bf16", activation(3)
    lists = ([turned, x], [turned, x], [weight], [rstd_of(turned), rstd])
    weightless = str(RoundingPlan.once(BF16, None))
    numbers = ([1e-6] * 2, [1.0, 0.0], [PLAN, weightless], ["none", "none"], all_three)
    yield QK_RMS_NORM_ROPE_BACKWARD, (*lists, None, None, *numbers)
    rotated = activation(6).view(2, 3, 8)
    yield (
        QK_RMS_NORM_ROPE_BACKWARD,
        (
            [rotated],
            [rotated],
            [weight],
            [],
            table,
            table,
            [1e-6],
            [0.0],
            [PLAN],
            [turn],
            both,
        ),
    )


@pytest.mark.parametrize(
    ("op", "arguments"), [pytest.param(*case, id=case[0].name()[10:]) for case in gradient_ops()]
)
def test_opcheck(op, arguments):
    torch.library.opcheck(op, arguments)
