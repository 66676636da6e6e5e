"""The pieces of the demo at tiny widths, and the real widths without their weights."""

import io
import math
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from rich.table import Table

from examples import demo
from examples.demo import Architecture, Difference, Outcome
from normfuse.report import Report, Site

TINY = Architecture(
    "Tiny",
    "llama",
    {
        "num_hidden_layers": 1,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
    },
)
FUSED = Site("rms_norm", True, None, "norm", "file.py:1", "inline")
DECLINED = Site(None, False, "a reason", "norm", "file.py:2", None)


def outcome(largest, bound=0.25):
    report = Report([FUSED, DECLINED], "graph")
    return Outcome("Tiny", report, Difference(0.125, 0.5), Difference(largest, 0.5), bound)


def printed(table: Table):
    console = Console(file=io.StringIO(), width=120)
    console.print(table)
    return console.file.getvalue()


def test_demo_of_a_tiny_model(capsys, monkeypatch):
    monkeypatch.setattr(demo, "TIMED_TOKENS", (64,))
    assert demo.main([TINY]) == 0
    text = capsys.readouterr().out
    for step in ("build it", "run eager", "explain", "plain torch.compile", 'backend="normfuse"'):
        assert step in text
    assert "3 of 3 norms fused (100 %) in 1 graph" in text
    assert "All within the allowed distance of eager" in text
    assert "python -m normfuse explain qwen3" in text


def test_failing_step_is_named(capsys):
    broken = replace(TINY, sizes={**TINY.sizes, "num_key_value_heads": 3})
    with pytest.raises(Exception, match=r"shape|size"):
        demo.main([broken])
    assert "failed: Tiny: " in capsys.readouterr().out


def test_transformers_missing(capsys, monkeypatch):
    monkeypatch.setitem(demo.sys.modules, "transformers", None)
    assert demo.main([TINY]) == 1
    text = capsys.readouterr().out
    assert text.startswith("transformers must be installed, got")
    assert text.endswith("pip install 'normfuse[hf]'\n")


@pytest.mark.parametrize(
    ("name", "query", "key", "down"),
    [
        ("Gemma 3 4B", (2048, 2560), (1024, 2560), (2560, 10240)),
        ("Qwen 3 8B", (4096, 4096), (1024, 4096), (4096, 12288)),
        ("Llama 3 8B", (4096, 4096), (1024, 4096), (4096, 14336)),
    ],
)
def test_real_widths(name, query, key, down):
    architecture = next(known for known in demo.ARCHITECTURES if known.name == name)
    model = demo.build(architecture, "meta")
    assert len(model.model.layers) == 2
    layer = model.model.layers[1]
    assert layer.self_attn.q_proj.weight.shape == query
    assert layer.self_attn.k_proj.weight.shape == key
    assert layer.mlp.down_proj.weight.shape == down
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_norm_weights_differ():
    model = demo.build(TINY, "cpu")
    weights = [p.tolist() for name, p in model.named_parameters() if "norm" in name]
    assert len(weights) == 3
    assert len({tuple(weight) for weight in weights}) == 3


def test_tokens_look_tokenised():
    tokens = demo.token_ids(4096)
    assert tokens.shape == (1, 4096)
    assert tokens[0, 0] == demo.BOS
    assert tokens.max() < demo.VOCABULARY
    assert tokens[0, 1:].min() >= 3  # no special token inside
    counts = tokens[0, 1:].bincount().sort(descending=True).values
    assert counts[:100].sum() > 0.4 * 4096  # a uniform draw would give them a tenth of that
    assert torch.equal(tokens, demo.token_ids(4096))


def test_difference():
    eager = torch.tensor([1.0, 2.0, -3.0, 4.0], dtype=torch.bfloat16)
    result = torch.tensor([1.0, 2.0, -3.5, 4.25], dtype=torch.bfloat16)
    assert Difference.between(result, eager) == Difference(largest=0.5, changed=0.5)
    assert Difference.between(eager, eager) == Difference(largest=0.0, changed=0.0)


def test_allowed_distance_is_twice_plain_and_a_rounding():
    eager = torch.tensor([1.0, -16.0], dtype=torch.bfloat16)
    rounding = 16 * 2**-8  # bfloat16 keeps 8 bits
    assert demo.allowed_distance(Difference(0.5, 1.0), eager) == 1.0 + rounding


@pytest.mark.parametrize(
    ("largest", "verdict", "status"),
    [(0.25, "ok", 0), (0.26, "too far", 1), (math.nan, "too far", 1)],
)
def test_verdict(largest, verdict, status):
    seen = outcome(largest)
    assert verdict in printed(demo.summary([seen]))
    console = Console(file=io.StringIO(), width=120)
    assert demo.verdict(console, [outcome(0.125), seen], 1.0) == status
    assert ("Too far from eager: Tiny." in console.file.getvalue()) is (status == 1)


def test_summary():
    text = printed(demo.summary([outcome(0.1)]))
    assert [cell.strip() for cell in text.splitlines()[-2].strip("│").split("│")] == [
        *("Tiny", "1 of 2", "0.125 (50%)", "0.1 (50%)", "0.25", "ok"),
    ]


def test_timings(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    seen = replace(outcome(0.1), times={64: (0.5, 0.4), 4096: (3.0, 4.0)})
    text = printed(demo.timings([seen]))
    assert "Median time of a forward pass on a GPU" in text
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines()[-3:-1]]
    assert rows == [
        ["Tiny", "64", "0.500 ms", "0.400 ms", "1.25x"],
        ["Tiny", "4096", "3.000 ms", "4.000 ms", "0.75x"],
    ]


@pytest.mark.gpu
def test_median_times():
    x = torch.randn(2048, 2048, device="cuda")
    short, long = demo.median_times([lambda: x @ x, lambda: [x @ x for _ in range(20)]], rounds=5)
    assert 0 < short < long
