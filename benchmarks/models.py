"""Unmodified Hugging Face models on a GPU: normfuse against plain torch.compile, end to end.

    python benchmarks/models.py --out benchmarks/results/models_h200.json

Real widths, random weights, few layers, a small vocabulary. Every contender runs under the CUDA
graphs of `mode="reduce-overhead"`; their replays are interleaved, and medians of GPU time are kept.
The models are much larger than the L2 cache, so every layer finds its weights and inputs cold.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

import normfuse

MODELS = {
    "gemma3 4b": (
        "gemma3_text",
        {
            "hidden_size": 2560,
            "intermediate_size": 10240,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 256,
        },
    ),
    "gemma3 27b": (
        "gemma3_text",
        {
            "hidden_size": 5376,
            "intermediate_size": 21504,
            "num_attention_heads": 32,
            "num_key_value_heads": 16,
            "head_dim": 128,
        },
    ),
    "qwen3 8b": (
        "qwen3",
        {
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
        },
    ),
    "llama3 8b": (
        "llama",
        {
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
        },
    ),
    "olmo2 7b": (
        "olmo2",
        {
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
        },
    ),
}
CONTENDERS = ("plain", "triton", "auto")


def build(name: str, layers: int) -> torch.nn.Module:
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    model_type, sizes = MODELS[name]
    config = CONFIG_MAPPING[model_type](
        **sizes, vocab_size=1024, num_hidden_layers=layers, pad_token_id=0
    )
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return model.eval()


def compiled(model: torch.nn.Module, contender: str):
    """The model under one contender, with a wrapper of its own so that none shares code."""
    if contender == "plain":
        options = {"triton.cudagraphs": True}
    else:
        options = normfuse.options(mode="reduce-overhead", lowering=contender)

    def forward(ids):
        return model(input_ids=ids, use_cache=False).logits

    code = forward.__code__.replace(co_name=f"forward_{contender}")
    own = type(forward)(code, forward.__globals__, code.co_name, None, forward.__closure__)
    return torch.compile(own, options=options, dynamic=False)


def milliseconds(runs, ids, rounds: int) -> dict[str, float]:
    """Median GPU time of each contender, their calls interleaved."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.compiler.cudagraph_mark_step_begin()
            start.record()
            run(ids)
            end.record()
            end.synchronize()
            times[name].append(start.elapsed_time(end))
    return {name: statistics.median(values) for name, values in times.items()}


def cell(name: str, batch: int, tokens: int, layers: int, rounds: int) -> dict[str, object]:
    torch._dynamo.reset()
    model = build(name, layers)
    ids = torch.randint(3, 1000, (batch, tokens), device="cuda")
    runs = {contender: compiled(model, contender) for contender in CONTENDERS}
    with torch.no_grad():
        milliseconds(runs, ids, 5)  # compile, record, replay
        times = milliseconds(runs, ids, rounds)
    ratios = {f"speedup_{c}": times["plain"] / times[c] for c in CONTENDERS if c != "plain"}
    return {"model": name, "batch": batch, "tokens": tokens, "layers": layers, **times, **ratios}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--shapes", nargs="+", default=["1x64", "1x512", "1x4096"])
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    rows = []
    cells = [(name, shape) for name in arguments.models for shape in arguments.shapes]
    for name, shape in track(cells, description="measuring"):
        batch, tokens = (int(part) for part in shape.split("x"))
        rows.append(cell(name, batch, tokens, arguments.layers, arguments.rounds))
        save(rows, arguments.out)
    table = Table("model", "batch x tokens", *(f"{c} ms" for c in CONTENDERS), "triton", "auto")
    for row in rows:
        table.add_row(
            row["model"],
            f"{row['batch']} x {row['tokens']}",
            *(f"{row[c]:.3f}" for c in CONTENDERS),
            f"{row['speedup_triton']:.3f}x",
            f"{row['speedup_auto']:.3f}x",
        )
    Console(width=110).print(table)


def save(rows, out: Path | None) -> None:
    """Written after every cell, so that an interrupted run keeps what it has."""
    if out is None:
        return
    import triton

    environment = {
        "command": "python benchmarks/models.py " + " ".join(sys.argv[1:]),
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "normfuse": normfuse.__version__,
        "unit": "ms of GPU time, median",
    }
    out.write_text(json.dumps({**environment, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
