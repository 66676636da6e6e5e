"""`lowering="auto"` leaves alone, before autograd, what no measurement favours."""

import pytest
import torch
import torch._inductor.config
from torch._inductor.utils import get_code, run_fw_bw_and_get_code
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import normfuse
from normfuse import tuning
from normfuse.explain import explain_with
from normfuse.ops import ROPE
from normfuse.ops.lowering import ALL_OPS, backward_of
from normfuse.passes import choice, lower
from normfuse.passes.recognise import is_op
from normfuse.settings import Settings
from normfuse.testing import capture
from normfuse.tuning import Document, Entry, Key, Measurement, minor
from tests import blocks, gated_blocks, op_arguments, rotary
from tests.blocks import activation
from tests.test_joint_norms import Spelled as JointNorms

TORCH = minor(torch.__version__)
LLAMA = "f32 unit=f32>bf16 weight=bf16 out=bf16"


@pytest.fixture
def a_gpu(monkeypatch, tmp_path):
    """The CPU in the part of a GPU that no shipped table knows."""
    monkeypatch.setattr(lower, "KERNEL_DEVICES", ("cpu",))
    monkeypatch.setattr(choice, "device_name", lambda device: "A GPU")
    monkeypatch.setenv("NORMFUSE_CACHE_DIR", str(tmp_path))


def code_of(module, inputs, options):
    """The source that Inductor generates for inference, without the comments in it."""

    def forward(*inputs):  # to one result, because code that does not run returns none
        results = module(*inputs)
        return results if isinstance(results, torch.Tensor) else torch.stack(results)

    with torch.no_grad(), torch._inductor.config.patch(force_disable_caches=True):
        codes = get_code(torch.compile(forward, options=options, dynamic=False), *inputs)
    return without_comments(codes)


def without_comments(codes):
    lines = "\n".join(codes).splitlines()
    return [line for line in lines if not line.lstrip().startswith("#")]


def ops_of(module, inputs, **options):
    """The ops that stand in the graphs before the last pass, forward and backward."""
    found = []
    original = lower.Lower.__call__

    def note(self, graph):
        found.extend(node.target._schema.name.split("::")[1] for node in graph.nodes if is_op(node))
        original(lower.Lower(Settings("inline")), graph)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lower.Lower, "__call__", note)
        results = capture(module, **options)(*inputs)
        if torch.is_grad_enabled():
            sum(one.float().sum() for one in results).backward()
    return sorted(found)


PAIR = (activation(4), activation(4))
ATTENTION = (rotary.hidden_states(), *rotary.tables())


def one_by_one():
    return rotary.OneByOne(blocks.Gemma4WeightlessNorm())


@pytest.mark.parametrize(
    ("block", "inputs", "op"),
    [
        (blocks.LlamaBlock, PAIR, "add_rms_norm"),
        (blocks.GraniteBlock, PAIR, "add_rms_norm"),
        (blocks.HyperClovaBlock, PAIR, "rms_norm_add"),
        (blocks.OlmoBlock, PAIR, "rms_norm_add"),
        (blocks.Gemma4Block, PAIR, "rms_norm_add_rms_norm"),
        (blocks.Gemma4ExpertNorms, PAIR, "rms_norms"),
        (blocks.Gemma4ExpertsBlock, (*PAIR, activation(4)), "dual_rms_norm_add_rms_norm"),
        (rotary.NormAfterTranspose, ATTENTION, "qk_rms_norm_rope"),
        (one_by_one, ATTENTION, "qk_rms_norm_rope"),
        (rotary.WholeProjections, ATTENTION, "qk_rms_norm"),
        (gated_blocks.Qwen3NextRMSNormGated, PAIR, "gated_rms_norm"),
        (gated_blocks.MambaRMSNormGated, PAIR, "gated_rms_norm"),
    ],
)
@pytest.mark.guarantee
def test_an_empty_table_generates_the_code_of_plain_inductor(block, inputs, op, a_gpu):
    module = block().bfloat16()
    with torch.no_grad():
        assert op in ops_of(module, inputs, lowering="inline")
    plain = code_of(module, inputs, {})
    assert len(plain) > 50
    assert code_of(module, inputs, normfuse.options()) == plain


class TwoWidths(torch.nn.Module):
    """A norm of 8 columns, which a measurement may favour, and one of 16, which none does."""

    def __init__(self):
        super().__init__()
        self.first, self.second = blocks.LlamaRMSNorm(8), blocks.LlamaRMSNorm(16)
        self.branch = torch.nn.Linear(8, 16)

    def forward(self, x, residual):
        total = x + residual
        return self.second(self.branch(self.first(total))), total


class TestATableThatKnowsSomeSites:
    """Which sites become ops at all, in inference and in training."""

    @pytest.fixture(autouse=True)
    def _a_gpu(self, a_gpu):
        self.module = TwoWidths().bfloat16()

    def ops(self):
        return ops_of(self.module, PAIR)

    def learn(self, op, inline_us, triton_us, *, rows=4, neighbours=(), width=8, words=()):
        key = Key("A GPU", TORCH, op, (LLAMA, *words), (width,), "bf16")
        entry = Entry(key, Measurement(rows, neighbours, inline_us, triton_us))
        provenance = ("A GPU", torch.__version__, "3.6.0", "0.1", "2026-01-31", "a test")
        tuning.tables().add(Document(*provenance, (entry,)))

    def test_a_width_at_which_a_kernel_won_is_taken_and_the_rest_left(self):
        self.learn("add_rms_norm", 20.0, 10.0)
        with torch.no_grad():
            assert self.ops() == ["add_rms_norm"]

    def test_a_width_at_which_none_won_is_left(self):
        self.learn("add_rms_norm", 10.0, 20.0)
        self.learn("add_rms_norm_backward", 20.0, 10.0)
        with torch.no_grad():
            assert self.ops() == []

    @pytest.mark.guarantee
    def test_heads_turn_at_a_width_at_which_rope_won_and_no_norm_follows(self):
        turned = rotary.WholeProjections().bfloat16()
        with torch.no_grad():
            self.learn("rope", 20.0, 10.0, width=rotary.DIM // 2)
            assert ops_of(turned, ATTENTION) == []
            self.learn("rope", 20.0, 10.0, width=rotary.DIM)
            assert ops_of(turned, ATTENTION) == ["rope"]
            assert self.ops() == []  # whose norms are as wide

    def test_a_norm_over_several_heads_is_as_wide_as_all_of_them(self):
        joint = JointNorms().bfloat16()
        words = (f"over {rotary.HEADS} heads", f"over {rotary.KEY_HEADS} heads")
        with torch.no_grad():
            self.learn("qk_rms_norm_rope", 20.0, 10.0, width=rotary.DIM)
            assert ops_of(joint, ATTENTION) == []
            self.learn("qk_rms_norm_rope", 20.0, 10.0, width=rotary.DIM, words=words)
            assert ops_of(joint, ATTENTION) == ["qk_rms_norm_rope"]

    def test_the_length_of_one_vector_is_as_wide_as_the_vector(self):
        """Its result has no axis at all."""
        self.learn("add_rms_norm", 20.0, 10.0)

        def scaled(x, residual):
            return x * x.flatten().norm(dim=-1), residual

        with torch.no_grad():
            assert ops_of(scaled, PAIR) == []

    @pytest.mark.guarantee
    def test_training_asks_for_the_backward_as_well(self):
        self.learn("add_rms_norm", 20.0, 10.0)
        assert self.ops() == []
        self.learn("add_rms_norm_backward", 11.0, 10.0)
        assert self.ops() == ["add_rms_norm", "add_rms_norm_backward"]

    @pytest.mark.guarantee
    def test_training_leaves_what_neither_way_favours(self):
        self.learn("add_rms_norm", 10.0, 20.0)
        self.learn("add_rms_norm_backward", 10.0, 20.0)
        self.learn("rms_norm", 20.0, 10.0)  # what the site would be without its sum
        self.learn("rms_norm_backward", 20.0, 10.0)
        assert self.ops() == []

    def test_training_takes_what_may_win_with_other_neighbours(self):
        self.learn("add_rms_norm", 10.0, 20.0)
        self.learn("add_rms_norm_backward", 10.0, 20.0)
        self.learn("add_rms_norm_backward", 20.0, 10.0, neighbours=("after mul",))
        assert self.ops() == ["add_rms_norm", "add_rms_norm_backward"]

    def test_training_leaves_what_won_with_other_rows_only(self):
        self.learn("add_rms_norm", 20.0, 10.0, rows=4096)
        self.learn("add_rms_norm_backward", 20.0, 10.0, rows=4096)
        assert self.ops() == []

    def test_a_group_is_as_wide_as_a_part_of_its_row(self):
        self.learn("gated_rms_norm", 20.0, 10.0)
        widths = choice.widths_won(["A GPU"], Settings())
        assert [width for width in range(1, 17) if widths.may_include(width)] == [1, 2, 4, 8]

    def test_what_is_measured_while_compiling_is_never_left(self):
        inputs = [x.clone() for x in PAIR]
        with torch.no_grad():
            found = ops_of(self.module, inputs, **{"normfuse.tune": "compile"})
        assert found == ["add_rms_norm", "rms_norm"]


def test_forced_forms_are_never_left(a_gpu):
    module = TwoWidths().bfloat16()
    with torch.no_grad():
        assert ops_of(module, PAIR, lowering="op") == ["add_rms_norm", "rms_norm"]


def test_the_report_of_a_training_graph_says_why_a_site_is_left(a_gpu):
    report = explain_with(TwoWidths().bfloat16(), PAIR)
    assert [(site.op, site.lowering) for site in report.sites] == [
        ("add_rms_norm", "inline"),
        ("rms_norm", "inline"),
    ]
    assert report.sites[0].lowering_reason == (
        f"not measured on A GPU with torch {TORCH} for add_rms_norm of width 8 at 4 rows: "
        "run `python -m normfuse tune`"
    )
    assert "normfuse" not in report.after


@pytest.mark.guarantee
def test_an_empty_table_trains_as_plain_inductor(a_gpu):
    module = blocks.LlamaBlock().bfloat16()

    def forward(x, residual):
        return module(x, residual)

    def code(options):
        inputs = [x.clone().requires_grad_() for x in PAIR]
        torch._dynamo.reset()
        with torch._inductor.config.patch(force_disable_caches=True):
            compiled = torch.compile(forward, options=options, dynamic=False)
            _, codes = run_fw_bw_and_get_code(lambda: compiled(*inputs))
        assert len(codes) == 2
        return without_comments(codes)

    assert code(normfuse.options()) == code({})


class Named(TorchDispatchMode):
    """Notes the names of our ops that run."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "normfuse":
            self.names.add(function._schema.name.split("::")[1])
        return function(*args, **(kwargs or {}))


FORWARDS = [op for op in ALL_OPS if not op._schema.name.endswith("_backward") and op is not ROPE]


@pytest.mark.parametrize("op", FORWARDS, ids=str)
def test_the_backward_whose_measurements_count_is_the_one_that_runs(op):
    def wants_gradient(value):
        is_learned = isinstance(value, torch.Tensor) and value.shape[-1] == op_arguments.WIDTH
        return value.requires_grad_() if is_learned else value  # not scales, nor cosines

    arguments = tree_map(wants_gradient, op_arguments.of(op, torch.bfloat16))
    *values, _ = tree_leaves(op(*arguments))
    with Named() as named:
        values[0].float().sum().backward()
    assert named.names == {backward_of(op._schema.name.split("::")[1])}
