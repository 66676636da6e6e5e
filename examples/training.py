"""Training a small Hugging Face model through the backend, its losses beside eager's.

    python examples/training.py --steps 200 --plot losses.png

A Gemma 3 with random weights learns to count in steps that each sequence chooses, with AdamW. Eager
trains it three times, each time with other batches: that is the band in which a loss may lie. The
compiled model sees the batches of the first run. Exit status 1 if its losses are further from that
run's than the runs are from each other. About a minute on two CPU cores; nothing is downloaded.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from transformers import AutoConfig, AutoModelForCausalLM

import normfuse  # noqa: F401 - registers the backend, also where the package is not installed

VOCABULARY, TOKENS, SEQUENCES = 31, 16, 8


def model(device: str, dtype: torch.dtype) -> Any:
    """The same weights at every call."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "gemma3_text",
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        sliding_window=16,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return AutoModelForCausalLM.from_config(config).to(device, dtype).train()


def batches(seed: int, steps: int, device: str) -> Iterator[torch.Tensor]:
    """Sequences that start anywhere and go on in steps of their own, modulo the vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        start, step = torch.randint(1, VOCABULARY, (2, SEQUENCES, 1), generator=generator)
        yield ((start + step * torch.arange(TOKENS)) % VOCABULARY).to(device)


def losses(learner: Any, call: Callable[..., Any], seed: int, steps: int, name: str) -> list[float]:
    """One training; `call` is the learner itself or its compiled form."""
    optimizer = torch.optim.AdamW(learner.parameters(), lr=1e-3)
    seen = []
    device = str(next(learner.parameters()).device)
    for tokens in track(batches(seed, steps, device), description=f"{name:<9}", total=steps):
        loss = call(input_ids=tokens, labels=tokens, use_cache=False).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        seen.append(loss.item())
    return seen


def distance(one: list[float], other: list[float]) -> float:
    """The largest between two curves of losses."""
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--plot", type=Path, help="a file for the picture; needs matplotlib")
    parser.add_argument("--lowering", default="auto", help="of normfuse; triton on a CUDA GPU")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    new = (device, getattr(torch, arguments.dtype))
    runs = []
    for seed in range(3):
        learner = model(*new)
        runs.append(losses(learner, learner, seed, arguments.steps, f"eager {seed}"))
    learner = model(*new)
    options = {"normfuse.lowering": arguments.lowering}
    compiled = torch.compile(learner, backend="normfuse", options=options)
    ours = losses(learner, compiled, 0, arguments.steps, "normfuse")
    band = max(distance(runs[0], other) for other in runs[1:])
    found = distance(ours, runs[0])
    print(f"last loss: eager {runs[0][-1]:.4f}, normfuse {ours[-1]:.4f}")
    print(f"furthest from eager on the same batches: {found:.4f}; eager's runs: {band:.4f}")
    if arguments.plot is not None:
        plot(runs, ours, arguments.plot)
    return int(found > band)


def plot(runs: list[list[float]], ours: list[float], path: Path) -> None:
    """Eager's runs in grey, the compiled one on top."""
    import matplotlib.pyplot as plt

    for seed, run in enumerate(runs):
        plt.plot(run, color="0.7", label="eager, three orders of batches" if seed == 0 else None)
    plt.plot(runs[0], color="black", linewidth=2, label="eager, the same batches")
    plt.plot(ours, color="tab:orange", linestyle="--", label="normfuse")
    plt.xlabel("step")
    plt.ylabel("loss")
    plt.legend()
    plt.savefig(path, dpi=120)


if __name__ == "__main__":
    sys.exit(main())
