"""Training a small Hugging Face model through the backend, its losses beside eager's.

    python examples/training.py --steps 200 --plot losses.png

A Gemma 3 with random weights learns to count in steps that each sequence chooses, with AdamW.
Eager trains it four times on the same batches, each time with its hidden units and the sequences
of a batch in another order: it is the same function of the same numbers, but every sum runs in
another order and is rounded otherwise. The largest distance between two of these runs is the width
of eager's band. The compiled model is inside if one of the runs is that close to it; exit status 1
if not. About a minute on two CPU cores; nothing is downloaded.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from transformers import AutoConfig, AutoModelForCausalLM

import normfuse  # noqa: F401 - registers the backend, also where the package is not installed

VOCABULARY, TOKENS, SEQUENCES = 31, 16, 8
ORDERS = 4


def model(device: str, dtype: torch.dtype, order: int = 0) -> Any:
    """The same weights at every call; all orders but 0 permute its hidden units."""
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
    learner = AutoModelForCausalLM.from_config(config)
    if order:
        permute(learner, torch.Generator().manual_seed(order))
    return learner.to(device, dtype).train()


@torch.no_grad()
def permute(learner: Any, generator: torch.Generator) -> None:
    """Reorders the residual stream and the inside of each MLP: the same function as before."""
    hidden = torch.randperm(learner.config.hidden_size, generator=generator)
    inner = torch.randperm(learner.config.intermediate_size, generator=generator)
    for name, weight in learner.named_parameters():
        part = name.split(".")[-2]
        if part in ("gate_proj", "up_proj"):
            weight.copy_(weight[inner])
        if part == "down_proj":
            weight.copy_(weight[:, inner])
        if part in ("o_proj", "down_proj") or part.endswith("layernorm") or part == "norm":
            weight.copy_(weight[hidden])
        elif part not in ("q_norm", "k_norm"):  # projections of the stream, and the embedding
            weight.copy_(weight[:, hidden])


def batches(order: int, steps: int, device: str) -> Iterator[torch.Tensor]:
    """Sequences that start anywhere and go on in steps of their own, modulo the vocabulary.

    All orders have the same batches; each has their sequences in an order of its own.
    """
    content, place = (torch.Generator().manual_seed(seed) for seed in (0, order))
    for _ in range(steps):
        start, step = torch.randint(1, VOCABULARY, (2, SEQUENCES, 1), generator=content)
        tokens = (start + step * torch.arange(TOKENS)) % VOCABULARY
        yield tokens[torch.randperm(SEQUENCES, generator=place)].to(device)


def losses(
    learner: Any, call: Callable[..., Any], order: int, steps: int, name: str
) -> list[float]:
    """One training; `call` is the learner itself or its compiled form."""
    optimizer = torch.optim.AdamW(learner.parameters(), lr=1e-3)
    seen = []
    device = str(next(learner.parameters()).device)
    for tokens in track(batches(order, steps, device), description=f"{name:<9}", total=steps):
        loss = call(input_ids=tokens, labels=tokens, use_cache=False).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        seen.append(loss.item())
    return seen


def eager_runs(steps: int, device: str, dtype: torch.dtype) -> list[list[float]]:
    """One for each order of the hidden units and of the sequences."""
    runs = []
    for order in range(ORDERS):
        learner = model(device, dtype, order)
        runs.append(losses(learner, learner, order, steps, f"eager {order}"))
    return runs


def distance(one: list[float], other: list[float]) -> float:
    """The largest between two curves of losses."""
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


def width(runs: list[list[float]]) -> float:
    """Of eager's band: the largest distance between two of its runs."""
    return max(distance(*pair) for pair in combinations(runs, 2))


def nearest(run: list[float], runs: list[list[float]]) -> float:
    """The distance to that of the runs which is closest."""
    return min(distance(run, other) for other in runs)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--plot", type=Path, help="a file for the picture; needs matplotlib")
    parser.add_argument("--lowering", default="auto", help="of normfuse; triton on a CUDA GPU")
    best = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=best, choices=["cuda", "cpu"])
    arguments = parser.parse_args(argv)
    new = (arguments.device, getattr(torch, arguments.dtype))
    runs = eager_runs(arguments.steps, *new)
    learner = model(*new)
    options = {"normfuse.lowering": arguments.lowering}
    compiled = torch.compile(learner, backend="normfuse", options=options)
    ours = losses(learner, compiled, 0, arguments.steps, "normfuse")
    found, band = nearest(ours, runs), width(runs)
    print(f"last loss: eager {runs[0][-1]:.4f}, normfuse {ours[-1]:.4f}")
    print(f"from normfuse to the nearest run of eager: {found:.2e}; eager's band: {band:.2e}")
    if arguments.plot is not None:
        plot(runs, ours, arguments.plot)
    return int(found > band)


def plot(runs: list[list[float]], ours: list[float], path: Path) -> None:
    """The losses, and below them how far each run is from eager's first."""
    import matplotlib.pyplot as plt

    _, (top, bottom) = plt.subplots(2, 1, sharex=True, layout="constrained")
    for order, run in enumerate(runs):
        label = f"eager, {ORDERS} orders of summation" if order == 0 else None
        top.plot(run, color="0.7", linewidth=3, label=label)
        bottom.semilogy(_differences(run, runs[0]), color="0.7")
    top.plot(ours, color="tab:orange", linestyle="--", label="normfuse")
    bottom.semilogy(_differences(ours, runs[0]), color="tab:orange")
    top.set_ylabel("loss")
    top.legend()
    bottom.set_ylabel("from eager's first run")
    bottom.set_xlabel("step")
    plt.savefig(path, dpi=120)
    plt.close()


def _differences(run: list[float], other: list[float]) -> list[float]:
    return [abs(a - b) for a, b in zip(run, other, strict=True)]


if __name__ == "__main__":
    sys.exit(main())
