"""The command line, in this process: `main([...])` is `python -m normfuse ...`."""

import subprocess
import sys

import pytest
import torch
from torch import nn

import normfuse
from normfuse.__main__ import main
from normfuse.cli import subject, tiny_models
from normfuse.cli.errors import UsageError
from normfuse.report import Report

# Every kind of decoder that the matcher was made for; others are tiny models just the same.
MODEL_TYPES = [
    *("llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "qwen3_next", "phi3", "t5"),
    *("gemma", "gemma2", "gemma3", "gemma3_text", "gemma3n_text", "gemma4_text", "glm4", "moshi"),
    *("olmo2", "olmo3", "granite", "granitemoehybrid", "llama4_text", "gpt_oss", "diffllama"),
    *("mamba", "mamba2", "deepseek_v3", "zamba"),
]


@pytest.fixture(autouse=True)
def log_width(monkeypatch):
    """As in a pipe, whatever terminal the tests run in."""
    monkeypatch.setenv("COLUMNS", "120")


@pytest.fixture
def factory_file(tmp_path):
    """A file with one factory of each form, and two that are none."""
    path = tmp_path / "mine.py"
    path.write_text(
        """
import torch
from torch import nn
from neighbour import WIDTH


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.RMSNorm(WIDTH)

    def forward(self, x, residual):
        return self.norm(x + residual)


def tensor():
    return torch.randn(2, WIDTH)


def three():
    return Block(), [tensor()], {"residual": tensor()}


def two_with_dict():
    return Block(), {"x": tensor(), "residual": tensor()}


def two_with_tuple():
    return Block(), (tensor(), tensor())


def alone():
    return Block()


def nothing():
    return None


def without_norm():
    return nn.Linear(WIDTH, 1), (tensor(),)


example_inputs = (tensor(), tensor())
"""
    )
    (tmp_path / "neighbour.py").write_text("WIDTH = 16\n")
    yield path
    sys.modules.pop("neighbour", None)


def refused(capsys, *argv):
    """The message of a command that must end with status 2."""
    assert main(["explain", *argv]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    return output.err.removeprefix("normfuse: error: ").rstrip()


def test_explain_prints_the_report(capsys):
    assert main(["explain", "llama"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "llama, tiny, 2 layers, bf16"
    assert lines[2].split() == ["norms", "fused", "into", "lowering", "source"]
    module, op = "model.layers.{0..1}.post_attention_layernorm", "add_rms_norm"
    assert any(line.split()[:3] == ["2", module, op] for line in lines)
    assert "5 of 5 norms fused (100 %) in 1 graph" in lines


def test_explain_prints_json_of_the_asked_depth_and_lowering(capsys):
    argv = ["llama", "--layers", "3", "--lowering", "op", "--dtype", "fp32", "--device", "cpu"]
    assert main(["explain", *argv, "--json"]) == 0
    report = Report.from_json(capsys.readouterr().out)
    assert report.num_sites == 7
    assert {site.lowering for site in report.sites} == {"op"}
    assert "bfloat16" not in report.after
    assert report.after.count("normfuse.add_rms_norm") == 6


def test_explain_prints_graphs(capsys, factory_file):
    assert main(["explain", f"{factory_file}:three", "--graph", "--lowering", "op"]) == 0
    before, after = capsys.readouterr().out.split("\nbefore\n")[1].split("\nafter\n")
    assert "torch.rms_norm(" in before
    assert "normfuse.add_rms_norm" in after


@pytest.mark.parametrize("name", ["three", "two_with_dict", "two_with_tuple", "alone"])
def test_factory_forms(capsys, factory_file, name):
    assert main(["explain", f"{factory_file}:{name}", "--min-coverage", "1"]) == 0
    output = capsys.readouterr().out
    assert output.startswith(f"{factory_file}:{name}\n")
    assert "1 of 1 norm fused (100 %) in 1 graph\n  1 norm in add_rms_norm" in output


def test_factory_takes_dtype(factory_file):
    loaded = subject.load(f"{factory_file}:three", "bf16", "cpu", None)
    assert not loaded.model.training
    tensors = [loaded.model.norm.weight, *loaded.args, loaded.kwargs["residual"]]
    assert {tensor.dtype for tensor in tensors} == {torch.bfloat16}


def test_factory_keeps_its_dtype(factory_file):
    loaded = subject.load(f"{factory_file}:three", None, None, None)
    assert loaded.args[0].dtype == torch.float32


def test_min_coverage_without_norms(capsys, factory_file):
    argv = ["explain", f"{factory_file}:without_norm", "--min-coverage"]
    assert main([*argv, "0.5"]) == 1
    assert capsys.readouterr().err.endswith(
        "the share of fused norms must be at least 0.5, got no norms at all: see the report\n"
    )
    assert main([*argv, "0"]) == 0


def test_min_coverage_not_reached(capsys, tmp_path):
    path = tmp_path / "layer_norm.py"
    path.write_text(
        """
import torch
from torch import nn

class Half(nn.RMSNorm):
    def forward(self, x):
        y = super().forward(x)
        centred = y - y.mean(-1, keepdim=True)
        return centred * torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + 1e-6)

def make():
    return Half(16), (torch.randn(2, 16),)
"""
    )
    assert main(["explain", f"{path}:make", "--min-coverage", "0.5"]) == 0
    assert main(["explain", f"{path}:make", "--min-coverage", "0.6"]) == 1
    output = capsys.readouterr()
    assert "a mean is subtracted before the squares" in output.out
    assert output.err.endswith("must be at least 0.6, got 0.500 (1 of 2): see the report\n")


def test_unknown_model_type_suggests_close_ones(capsys):
    assert refused(capsys, "gemma3_txt") == (
        "MODEL must be a model type of transformers or path.py:factory, got gemma3_txt: "
        "did you mean gemma3_text or gemma3n_text or gemma4_text?"
    )
    assert refused(capsys, "what").endswith("got what: --list shows all of them")


def test_transformers_missing(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    message = refused(capsys, "llama")
    assert message.startswith("transformers must be installed for model types, got")
    assert message.endswith("pip install 'normfuse[hf]'")


def test_model_type_that_does_not_run_in_bfloat16(capsys):
    """xLSTM's own kernels mix float32 and bfloat16 (transformers 5.17)."""
    message = refused(capsys, "xlstm")
    assert message.startswith("xlstm must build from its shrunk configuration and run, got Runtime")
    assert message.endswith(": try --dtype fp32, or pass path.py:factory with your own model")
    assert subject.load("xlstm", "fp32", "cpu", None).title == "xlstm, tiny, 2 layers, fp32"


def test_factory_missing(capsys, factory_file, tmp_path):
    assert refused(capsys, f"{tmp_path}/gone.py:make") == (
        f"path.py:factory must name a file, got {tmp_path}/gone.py: correct the path"
    )
    message = refused(capsys, f"{factory_file}:made")
    assert message.startswith(f"path.py:factory must name a function in {factory_file}, got made:")
    assert "it has Block, tensor, three, two_with_dict" in message


def test_factory_returns_something_else(capsys, factory_file):
    assert refused(capsys, f"{factory_file}:nothing").startswith(
        f"{factory_file}:nothing must return (model, args, kwargs) or (model, inputs), got NoneType"
    )


def test_options_that_do_not_fit_are_refused(capsys, factory_file):
    assert refused(capsys).startswith("MODEL must be given, got none")
    assert refused(capsys, "llama", "--layers", "0").startswith("--layers must be at least 1")
    assert refused(capsys, "llama", "--min-coverage", "90").startswith(
        "--min-coverage must be betw"
    )
    assert refused(capsys, f"{factory_file}:three", "--layers", "2").startswith(
        "--layers must come with a model type"
    )
    assert refused(capsys, "gemma3n_text", "--layers", "2") == (
        "the tiny gemma3n_text must have 4 layers, got 2: leave out --layers"
    )
    assert refused(capsys, "wav2vec2").startswith(
        "a model type must take input_ids, got one that takes input_values"
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_cuda_device(capsys):
    assert refused(capsys, "llama", "--device", "cuda") == (
        "--device cuda must have a CUDA device, got none: pass --device cpu"
    )


def test_list_names_model_types(capsys):
    assert main(["explain", "--list"]) == 0
    assert set(MODEL_TYPES) <= set(capsys.readouterr().out.split())


@pytest.mark.parametrize("argv", [[], ["explan"], ["explain", "llama", "--dtype", "int8"]])
def test_argparse_refusals_exit_with_2(argv):
    with pytest.raises(SystemExit) as exit_info:
        main(argv)
    assert exit_info.value.code == 2


def test_module_runs_as_a_command():
    command = [sys.executable, "-m", "normfuse", "--version"]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert output == f"normfuse {normfuse.__version__} (torch {torch.__version__})\n"


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_tiny_model_runs(model_type):
    model, config = tiny_models.build(model_type, torch.float32)
    with torch.no_grad():
        first = model(**tiny_models.example_inputs(model, config))[0]
    assert torch.isfinite(first).all()
    assert getattr(config.get_text_config(), "num_hidden_layers", 2) <= 4
    assert sum(parameter.numel() for parameter in model.parameters()) < 2_000_000


def test_tiny_model_has_a_layer_of_each_kind():
    _, config = tiny_models.build("gemma3_text", torch.float32)
    assert config.layer_types == ["sliding_attention", "full_attention"]
    _, config = tiny_models.build("gemma3_text", torch.float32, layers=5)
    assert config.layer_types == ["sliding_attention", "full_attention"] * 2 + ["sliding_attention"]


def test_tiny_model_is_the_same_every_time():
    first, _ = tiny_models.build("llama", torch.float32)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    again, _ = tiny_models.build("llama", torch.float32)
    assert torch.equal(first.lm_head.weight, again.lm_head.weight)
    assert torch.equal(torch.get_rng_state(), before)


def test_composite_model_type_shrinks_every_part():
    model, config = tiny_models.build("gemma3", torch.float32)
    assert config.text_config.hidden_size == 64
    assert config.vision_config.num_hidden_layers == 2
    assert isinstance(model, nn.Module)


def test_layers_to_keep():
    lists = {"layer_types": ["a", "a", "b", "a"], "mlp_types": ["dense", "moe", "moe", "moe"]}
    assert tiny_models.layers_to_keep(lists, 4) == [0, 1, 2]
    assert tiny_models.layers_to_keep({}, 32) == [0, 0]
    assert tiny_models.layers_to_keep(lists, 4, wanted=4) == [0, 1, 2, 0]


def test_usage_errors_are_not_hidden_by_others():
    with pytest.raises(UsageError, match=r"^the tiny gemma3n_text must have 4 layers, got 1"):
        subject.load("gemma3n_text", None, None, 1)
