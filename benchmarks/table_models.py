"""The models that the shipped tables are measured for: one factory each, for `normfuse tune`.

    python benchmarks/table_models.py --out normfuse/tuning/tables/nvidia_h200.json

Real widths and heads, one layer of each kind, at least two, and random weights. Each row count is
one sequence without a cache.
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

from normfuse.cli import real_models

ROWS = (1, 16, 64, 256, 512, 1024, 4096, 16384)


def llama3_8b(rows: int) -> Any:
    heads = {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}
    return real_models.build("llama", rows, hidden_size=4096, intermediate_size=14336, **heads)


def qwen3_8b(rows: int) -> Any:
    heads = {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}
    return real_models.build("qwen3", rows, hidden_size=4096, intermediate_size=12288, **heads)


def qwen3_30b_a3b(rows: int) -> Any:
    sizes = {"hidden_size": 2048, "moe_intermediate_size": 768, "num_experts_per_tok": 8}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128}
    return real_models.build("qwen3_moe", rows, **sizes, **heads)


def gemma3_4b(rows: int) -> Any:
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256}
    return _gemma3(rows, hidden_size=2560, intermediate_size=10240, **heads)


def gemma3_12b(rows: int) -> Any:
    heads = {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 256}
    return _gemma3(rows, hidden_size=3840, intermediate_size=15360, **heads)


def gemma3_27b(rows: int) -> Any:
    heads = {"num_attention_heads": 32, "num_key_value_heads": 16, "head_dim": 128}
    return _gemma3(rows, hidden_size=5376, intermediate_size=21504, **heads)


def _gemma3(rows: int, **sizes: int) -> Any:
    return real_models.build("gemma3_text", rows, sliding_window=1024, **sizes)


def gemma4_dense(rows: int) -> Any:
    """Width 5376."""
    heads = {"num_attention_heads": 32, "num_key_value_heads": 16, "head_dim": 256}
    return _gemma4(rows, hidden_size=5376, intermediate_size=21504, **heads)


def gemma4_experts(rows: int) -> Any:
    """Width 2816, dense branch and experts side by side, keys that serve as values."""
    heads = {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 256}
    experts = {
        "enable_moe_block": True,
        "num_experts": 128,
        "top_k_experts": 8,
        "moe_intermediate_size": 704,
    }
    shared = {"attention_k_eq_v": True, "num_global_key_value_heads": 2}
    sizes = {"hidden_size": 2816, "intermediate_size": 2112}
    return _gemma4(rows, **sizes, **heads, **experts, **shared)


def _gemma4(rows: int, **sizes: Any) -> Any:
    return real_models.build("gemma4_text", rows, hidden_size_per_layer_input=0, **sizes)


def olmo2_7b(rows: int) -> Any:
    heads = {"num_attention_heads": 32, "num_key_value_heads": 32}
    return real_models.build("olmo2", rows, hidden_size=4096, intermediate_size=11008, **heads)


def glm4_9b(rows: int) -> Any:
    heads = {"num_attention_heads": 32, "num_key_value_heads": 2, "head_dim": 128}
    return real_models.build("glm4", rows, hidden_size=4096, intermediate_size=13696, **heads)


MODELS = (
    llama3_8b,
    qwen3_8b,
    qwen3_30b_a3b,
    gemma3_4b,
    gemma3_12b,
    gemma3_27b,
    gemma4_dense,
    gemma4_experts,
    olmo2_7b,
    glm4_9b,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = [model.__name__ for model in MODELS]
    parser.add_argument("--models", nargs="+", default=names, choices=names)
    parser.add_argument("--rows", nargs="+", default=[str(rows) for rows in ROWS])
    parser.add_argument("--jobs", default=str(min(16, os.cpu_count() or 1)))
    parser.add_argument("--out", required=True)
    arguments = parser.parse_args()
    specs = [f"{os.path.relpath(__file__)}:{name}" for name in arguments.models]
    argv = ["tune", *specs, "--rows", *arguments.rows]
    argv += ["--jobs", arguments.jobs, "--out", arguments.out]
    os.execv(sys.executable, [sys.executable, "-m", "normfuse", *argv])


if __name__ == "__main__":
    main()
