"""The models that the shipped tables are measured for: factories for `normfuse tune`.

    python benchmarks/table_models.py --out normfuse/tuning/tables/nvidia_h200.json
    python benchmarks/table_models.py --training \
        --out normfuse/tuning/tables/nvidia_h200_training.json

Real widths and heads (`model_zoo.py`), one layer of each kind, at least two, and random weights.
Inference: each number of rows is a sequence without a cache, one that fills a static cache and, up
to 64, as many sequences that get their next token from one, so that every cell of `models.py` is
measured. Training: a forward and a backward of one sequence.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from model_zoo import MODELS, build, decode, prefill, prefill_cached

ROWS = (1, 16, 64, 256, 512, 1024, 4096, 16384)
TRAINING_ROWS = (4096, 8192)
TRAINED = ("gemma3_4b", "gemma3_12b", "gemma3_27b", "qwen3_8b", "llama3_8b")
MOST_DECODED = 64  # sequences of a batch
EXPERTS = 16  # built, of 128: their number changes no norm

DEVICE = "cuda"
TINY = False


def __getattr__(name: str) -> Callable[..., Any]:
    """The factory of a model, by its name; that of a training step, with `_training` behind it."""
    model = name.removesuffix("_training")
    if model not in MODELS:
        raise AttributeError(f"a factory must be one of {', '.join(MODELS)}, got {name}")
    return partial(training if name != model else inference, model)


def inference(name: str, rows: int) -> tuple[Callable[[], Any], tuple[()], dict[str, Any]]:
    """Forwards of `rows` tokens, and steps of decoding in the same graph."""
    model = build(name, DEVICE, None, tiny=TINY, num_experts=EXPERTS)
    steps = [prefill(model, rows), prefill_cached(model, rows)]
    if rows <= MOST_DECODED:
        steps.append(decode(model, rows, filled=4, cache_size=8))

    def run() -> Any:
        return [model(**step).logits for step in steps]

    return run, (), {}


def training(name: str, rows: int) -> tuple[Any, tuple[()], dict[str, Any]]:
    """A forward of `rows` tokens whose parameters want gradients."""
    model = build(name, DEVICE, None, tiny=TINY).train()
    return model, (), prefill(model, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--training", action="store_true", help="forward and backward")
    parser.add_argument("--models", nargs="+", choices=list(MODELS))
    parser.add_argument("--rows", nargs="+", type=int)
    parser.add_argument("--jobs", default=str(min(16, os.cpu_count() or 1)))
    parser.add_argument("--out", required=True)
    arguments = parser.parse_args()
    suffix = "_training" if arguments.training else ""
    models = arguments.models or (TRAINED if arguments.training else MODELS)
    rows = arguments.rows or (TRAINING_ROWS if arguments.training else ROWS)
    specs = [f"{os.path.relpath(__file__)}:{name}{suffix}" for name in models]
    argv = ["tune", *specs, "--rows", *map(str, rows)]
    argv += ["--training"] if arguments.training else []
    argv += ["--jobs", arguments.jobs, "--out", arguments.out]
    os.execv(sys.executable, [sys.executable, "-m", "normfuse", *argv])


if __name__ == "__main__":
    main()
