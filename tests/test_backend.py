"""`torch.compile(..., backend="normfuse")`: modes, options, the user's own passes."""

import subprocess
import sys

import pytest
import torch
from torch._dynamo.exc import BackendCompilerFailed
from torch._inductor import config as inductor_config
from torch._inductor import custom_graph_pass

import normfuse
from normfuse import backend
from normfuse.passes.inductor import HOOKS
from tests.blocks import GemmaBlock, LlamaBlock, LlamaRMSNorm, activation

# Absent in torch 2.11.
InferenceAware = getattr(custom_graph_pass, "CustomInferenceAwareGraphPass", None)
OP = {"normfuse.lowering": "op", "disable_cpp_codegen": True}  # no code: fast, and eager's bits
AFTER_RECOGNISE = "post_grad_custom_post_pass"  # the user's pass there sees our ops


def names_of_ops(graph):
    return [node.target._opname for node in graph.nodes if "normfuse" in str(node.target)]


class Spy:
    """A user's pass that keeps what `look` sees of each graph; it has no identity: never cached."""

    def __init__(self, look=names_of_ops):
        self.look = look
        self.seen = []

    def __call__(self, graph):
        self.seen.append(self.look(graph))


def compiled(block, spy=None, **options):
    """Our options without their prefix."""
    given = {**OP, **{f"normfuse.{name}": value for name, value in options.items()}}
    return torch.compile(block, backend="normfuse", options={**given, AFTER_RECOGNISE: spy})


def in_a_new_process(program):
    return subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    ).stdout


def test_is_found_by_its_name_alone():
    program = """
import sys, torch
norm, x = torch.nn.RMSNorm(8), torch.randn(2, 8)
print("normfuse" in torch._dynamo.list_backends(), "normfuse" in sys.modules)
options = {"normfuse.lowering": "op", "disable_cpp_codegen": True}
y = torch.compile(norm, backend="normfuse", options=options)(x)
print(torch.equal(y, norm(x)), "normfuse" in sys.modules)
"""
    assert in_a_new_process(program) == "True False\nTrue True\n"


def test_works_without_triton():
    program = """
import sys

class WithoutTriton:
    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] != "triton":
            return self.finder.find_spec(name, path, target)

sys.meta_path[:] = map(WithoutTriton, sys.meta_path)
import torch, normfuse
norm, x = torch.nn.RMSNorm(8), torch.randn(2, 8)
print(torch.equal(normfuse.rms_norm(x, norm.weight, torch.finfo(x.dtype).eps), norm(x)))
options = {"normfuse.lowering": "triton", "disable_cpp_codegen": True}
print(torch.equal(torch.compile(norm, backend="normfuse", options=options)(x), norm(x)))
print(normfuse.explain(norm, x).num_fused, "triton" in sys.modules)
"""
    assert in_a_new_process(program) == "True\nTrue\n1 False\n"


def test_a_block_becomes_the_longest_chain():
    block, (x, residual), spy = GemmaBlock().bfloat16(), (activation(4), activation(4)), Spy()

    y = compiled(block, spy)(x, residual)

    assert spy.seen[0] == ["rms_norm_add_rms_norm", "rms_norm_add"]
    assert torch.equal(y, block(x, residual))


def mode_in_force(graph):
    return inductor_config.max_autotune, inductor_config.triton.cudagraphs


MODES = pytest.mark.parametrize(
    ("mode", "in_force"),
    [
        (None, (False, False)),
        ("default", (False, False)),
        ("reduce-overhead", (False, True)),
        ("max-autotune", (True, True)),
        ("max-autotune-no-cudagraphs", (True, False)),
    ],
)


@MODES
def test_mode(mode, in_force):
    norm, x, spy = LlamaRMSNorm(), activation(4), Spy(mode_in_force)

    with inductor_config.patch({AFTER_RECOGNISE: spy, "disable_cpp_codegen": True}):
        torch.compile(norm, backend="normfuse", mode=mode)(x)

    assert spy.seen[0] == in_force


@MODES
def test_mode_in_options_for_inductor(mode, in_force):
    norm, x, spy = LlamaRMSNorm(), activation(4), Spy(mode_in_force)
    options = normfuse.options(mode, disable_cpp_codegen=True, **{AFTER_RECOGNISE: spy})

    torch.compile(norm, options=options)(x)

    assert spy.seen[0] == in_force


def test_an_option_wins_over_its_mode():
    options = normfuse.options("max-autotune", max_autotune=False)

    assert options["max_autotune"] is False
    assert options["triton.cudagraphs"] is True


def test_our_options_stand_beside_those_of_inductor():
    norm, x = LlamaRMSNorm(), activation(4)
    spy = Spy(lambda graph: (inductor_config.max_autotune, names_of_ops(graph)))
    options = {**OP, "max_autotune": True, AFTER_RECOGNISE: spy}

    y = torch.compile(norm, backend="normfuse", options=options)(x)

    assert spy.seen[0] == (True, ["rms_norm"])
    assert torch.equal(y, norm(x))


def test_options_for_inductor_bring_our_passes():
    block, x, spy = LlamaBlock(), activation(4, dtype=torch.float32), Spy()
    ours = {"lowering": "op", "skip": ["add_rms_norm"]}
    options = normfuse.options(**ours, disable_cpp_codegen=True, **{AFTER_RECOGNISE: spy})

    y = torch.compile(block, options=options)(x, x)

    assert spy.seen[0] == ["rms_norm"]
    assert torch.equal(y, block(x, x))


def test_the_dashes_of_torch_compile_work_in_options():
    norm, x, spy = LlamaRMSNorm(), activation(4), Spy()
    options = {**OP, "post-grad-custom-post-pass": spy}

    torch.compile(norm, backend="normfuse", options=options)(x)

    assert spy.seen[0] == ["rms_norm"]


def test_equal_options_compile_nothing_again():
    norm, x = LlamaRMSNorm(), activation(4)

    def with_options(skip):
        options = normfuse.options(lowering="op", skip=skip, disable_cpp_codegen=True)
        return torch.compile(norm, options=options)

    with_options(["a.*"])(x)
    with torch.compiler.set_stance("fail_on_recompile"):
        with_options("a.*")(x)
        with pytest.raises(RuntimeError, match="Detected recompile"):
            with_options(["b.*"])(x)


@pytest.mark.parametrize(
    ("options", "ops"),
    [
        ({}, ["add_rms_norm"]),
        ({"skip": ["add_rms_norm"]}, ["rms_norm"]),
        ({"skip": "rms_norm_add, add_rms_norm"}, ["rms_norm"]),
        ({"skip": ["layers.*.norm"]}, []),
        ({"skip": ["layers.1.*"]}, ["add_rms_norm"]),
        ({"rules": ["rms_norm"]}, ["rms_norm"]),
        ({"rules": "rms_norm, add_rms_norm"}, ["add_rms_norm"]),
        ({"rules": []}, []),
    ],
    ids=str,
)
def test_rules_and_skip(options, ops):
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.ModuleList([LlamaBlock()])

        def forward(self, x, residual):
            return self.layers[0](x, residual)

    model, x, spy = Model(), activation(4, dtype=torch.float32), Spy()

    y = compiled(model, spy, **options)(x, x)

    assert spy.seen[0] == ops
    assert torch.equal(y, model(x, x))


@pytest.mark.parametrize(
    ("numerics", "plan"),
    [
        ("exact", "f32 unit=f32>bf16 weight=bf16 out=bf16"),
        ("fast", "f32 unit=f32 weight=f32 out=bf16"),
    ],
)
def test_numerics_is_in_the_plan(numerics, plan):
    norm, x = LlamaRMSNorm().bfloat16(), activation(4)
    spy = Spy(lambda graph: next(n.args[-1] for n in graph.nodes if "normfuse" in str(n.target)))

    compiled(norm, spy, numerics=numerics)(x)

    assert spy.seen[0] == plan


LOWERINGS = "auto, triton, inline, op"
RULES = (
    "rms_norm, l2_norm, qk_rms_norm_rope, gated_rms_norm, modulated_rms_norm, dual_rms_norm_add, "
    "rms_norm_add, rms_norms, dual_rms_norm_add_rms_norm, rms_norm_add_rms_norm, qk_rms_norm, "
    "add_rms_norm, rope"
)
OPTIONS = (
    "normfuse.lowering, normfuse.numerics, normfuse.rules, normfuse.skip, "
    "normfuse.tune, normfuse.margin, normfuse.check"
)
WRONG = [
    (
        {"normfuse.lowring": "op"},
        f"ValueError: an option must be one of {OPTIONS}, got normfuse.lowring: correct its name",
    ),
    (
        {"normfuse.lowering": "cuda"},
        f"ValueError: normfuse.lowering must be one of {LOWERINGS}, got 'cuda': choose one of them",
    ),
    (
        {"normfuse.numerics": True},
        "ValueError: normfuse.numerics must be one of exact, fast, got True: choose one of them",
    ),
    (
        {"normfuse.rules": ["add_rms_norm", "add_norm"]},
        f"ValueError: normfuse.rules must be one of {RULES}, got 'add_norm': choose one of them",
    ),
    (
        {"normfuse.skip": 3},
        "TypeError: normfuse.skip must be a list of names, got 3: "
        "pass for example ['add_rms_norm']",
    ),
    (
        {"max_autotun": True},
        "ValueError: an option must start with 'normfuse.' or be one of Inductor's, "
        "got 'max_autotun': did you mean max_autotune, max_autotune_gemm, max_autotune_pointwise?",
    ),
    (
        {"lowering": "op"},
        "ValueError: an option must start with 'normfuse.' or be one of Inductor's, "
        "got 'lowering': did you mean normfuse.lowering?",
    ),
    (
        {"max_autotune": "yes"},
        "TypeError: the option max_autotune of Inductor must be bool, got 'yes': "
        "pass for example False",
    ),
]


@pytest.mark.parametrize(("options", "message"), WRONG, ids=lambda case: str(case)[:40])
def test_wrong_options(options, message):
    with pytest.raises(BackendCompilerFailed) as raised:
        torch.compile(LlamaRMSNorm(), backend="normfuse", options=options)(activation(2))
    assert message in str(raised.value).splitlines()


def test_a_misspelled_keyword_of_options():
    with pytest.raises(ValueError, match="got 'lowerin': did you mean lowering"):
        normfuse.options(lowerin="op")


def test_wrong_mode():
    with pytest.raises(ValueError, match="mode must be one of") as raised:
        normfuse.options("fastest")
    assert str(raised.value) == (
        "mode must be one of default, lite, reduce-overhead, max-autotune-no-cudagraphs, "
        "max-autotune, got 'fastest': choose one of them"
    )


@pytest.mark.parametrize("where", ["options", "configuration"])
@pytest.mark.parametrize("hook", HOOKS)
def test_the_users_pass_runs_before_ours(hook, where):
    norm, x, spy = LlamaRMSNorm(), activation(4), Spy()
    passes = {hook: spy}

    with inductor_config.patch(passes if where == "configuration" else {}):
        options = {**OP, **(passes if where == "options" else {})}
        y = torch.compile(norm, backend="normfuse", options=options)(x)

    seen = {
        "pre_grad_custom_pass": [],
        "joint_custom_pre_pass": ["rms_norm", "rms_norm_backward"],
        "joint_custom_post_pass": ["rms_norm", "rms_norm_backward"],
        "post_grad_custom_post_pass": ["rms_norm"],
    }
    assert spy.seen[0] == seen[hook]
    assert torch.equal(y, norm(x))


@pytest.mark.parametrize("hook", HOOKS)
def test_the_users_passes_run_in_their_order(hook):
    norm, x, order = LlamaRMSNorm(), activation(4), []
    passes = [lambda graph: order.append("first"), lambda graph: order.append("second")]

    torch.compile(norm, backend="normfuse", options={**OP, hook: passes})(x)

    assert order[:2] == ["first", "second"]


class ForInference(InferenceAware or custom_graph_pass.CustomGraphPass):
    def __init__(self):
        self.seen = []

    def __call__(self, graph, is_inference):
        self.seen.append((is_inference, names_of_ops(graph)))

    def uuid(self):
        return None


@pytest.mark.skipif(InferenceAware is None, reason="this torch has no such pass")
@pytest.mark.parametrize("alone", [True, False])
def test_the_users_pass_learns_whether_it_is_inference(alone):
    norm, x, users = LlamaRMSNorm(), activation(4), ForInference()
    model = compiled(norm, users if alone else [Spy(), users])

    with torch.no_grad():
        model(x)
    model(x)

    assert users.seen[:2] == [(True, ["rms_norm"]), (False, ["rms_norm"])]


def test_warns_once_outside_the_tested_range(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "3.0.1+cpu")
    monkeypatch.setattr(backend, "_warned", False)

    with pytest.warns(UserWarning, match="normfuse is tested") as warned:
        normfuse.options()
    normfuse.options()  # a second warning would be an error here

    assert [str(warning.message) for warning in warned] == [
        "normfuse is tested with torch >= 2.11 and < 2.16, this is 3.0.1+cpu: "
        "check the report of normfuse.explain(model, ...)"
    ]


@pytest.mark.parametrize("version", ["2.11.0", "2.13.1+cu130", "2.13.0a0+git1234567"])
def test_is_silent_inside_the_tested_range(monkeypatch, version):
    monkeypatch.setattr(torch, "__version__", version)
    monkeypatch.setattr(backend, "_warned", False)

    normfuse.options()

    assert not backend._warned


def test_the_public_surface_needs_one_import():
    """Every name that the README uses is there after `import normfuse`."""
    code = "import normfuse; normfuse.testing.capture; normfuse.explain; normfuse.options"
    names = "; ".join(f"normfuse.{name}" for name in normfuse.__all__)
    subprocess.run([sys.executable, "-c", f"{code}; {names}"], check=True)
