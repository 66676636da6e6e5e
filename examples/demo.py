"""The main job, start to finish: `make demo`.

Three architectures from transformers, as wide as the real models but with two layers and random
weights, run in eager, with plain torch.compile and with torch.compile(backend="normfuse"). The demo
shows which norms are fused and compares the results, on a CUDA GPU the times as well. Nothing is
downloaded. It exits with 1 if a result is further from eager than plain torch.compile explains.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table

import normfuse

VOCABULARY = 8192  # of 128k to 262k: the demo is about norms, and has to fit into 6 GiB of memory
TOKENS = 64
TIMED_TOKENS = (64, 4096)  # about a step of serving many users, and a long prompt
BOS = 2


@dataclass(frozen=True)
class Architecture:
    """A model type of transformers, with sizes that go into its configuration."""

    name: str
    model_type: str
    sizes: dict[str, Any]


ARCHITECTURES = (
    Architecture(
        "Gemma 3 4B",
        "gemma3_text",
        {
            "hidden_size": 2560,
            "intermediate_size": 10240,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    Architecture(
        "Qwen 3 8B",
        "qwen3",
        {
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
        },
    ),
    Architecture(
        "Llama 3 8B",
        "llama",
        {
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "rms_norm_eps": 1e-5,
        },
    ),
)


@dataclass(frozen=True)
class Difference:
    """How far a result is from eager's."""

    largest: float  # absolute
    changed: float  # share of the elements that are not bit-equal

    @classmethod
    def between(cls, result: torch.Tensor, eager: torch.Tensor) -> Difference:
        distance = (result.float() - eager.float()).abs().max().item()
        return cls(distance, (result != eager).float().mean().item())


@dataclass
class Outcome:
    """What the demo found out about one architecture."""

    name: str
    report: normfuse.Report
    plain: Difference
    fused: Difference
    bound: float
    times: dict[int, tuple[float, float]] = field(default_factory=dict)  # tokens -> ms: plain, ours

    @property
    def is_within_bound(self) -> bool:
        return self.fused.largest <= self.bound  # false for NaN


class Steps:
    """The progress display; every step is also a line of text that stays."""

    def __init__(self, console: Console, total: int) -> None:
        self.console = console
        self.start = time.monotonic()
        self.progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            transient=True,
        )
        self.task = self.progress.add_task("", total=total)

    @contextmanager
    def step(self, text: str) -> Iterator[None]:
        self.progress.update(self.task, description=text)
        begin = time.monotonic()
        try:
            yield
        except Exception:
            self.console.print(f"failed: {text}", style="bold red")
            raise
        took = time.monotonic() - begin
        self.console.print(f"{took:6.1f} s  {text}", style="dim")
        self.progress.advance(self.task)


def build(architecture: Architecture, device: str) -> Any:
    """The model as transformers builds it, in bfloat16, with seeded random weights."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    config = CONFIG_MAPPING[architecture.model_type](
        vocab_size=VOCABULARY,
        bos_token_id=BOS,
        eos_token_id=1,
        pad_token_id=0,
        **{"num_hidden_layers": 2, **architecture.sizes},
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        if "norm" in name:  # fresh norms are all ones, and would hide a weight that is mixed up
            parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


def token_ids(tokens: int, vocabulary: int = VOCABULARY) -> torch.Tensor:
    """One sequence that looks tokenised: it starts with BOS, and few tokens make up most of it."""
    generator = torch.Generator().manual_seed(0)
    ranks = torch.arange(vocabulary - 3)
    frequencies = 1 / (ranks + 2.7)  # Zipf's law, with Mandelbrot's shift
    drawn = torch.multinomial(frequencies, tokens - 1, replacement=True, generator=generator)
    shuffled = torch.randperm(vocabulary - 3, generator=generator) + 3  # after the special tokens
    return torch.cat([torch.tensor([BOS]), shuffled[drawn]])[None]


def allowed_distance(plain: Difference, eager: torch.Tensor) -> float:
    """Twice the distance of plain torch.compile, plus one rounding of the largest result."""
    rounding = torch.finfo(eager.dtype).eps / 2 * eager.abs().max().item()
    return 2 * plain.largest + rounding


def examine(architecture: Architecture, device: str, steps: Steps) -> Outcome:
    """Everything about one architecture."""
    with steps.step(f"{architecture.name}: build it"):
        model = build(architecture, device)
        inputs = {"input_ids": token_ids(TOKENS).to(device), "use_cache": False}
    with steps.step(f"{architecture.name}: run eager"):
        eager = model(**inputs).logits
    with steps.step(f"{architecture.name}: normfuse.explain"):
        report = normfuse.explain(model, **inputs)
    steps.console.print("", report, "")
    plain_model = torch.compile(model, dynamic=False)
    with steps.step(f"{architecture.name}: compile and run, plain torch.compile"):
        plain = Difference.between(plain_model(**inputs).logits, eager)
    fused_model = torch.compile(model, backend="normfuse", dynamic=False)
    with steps.step(f'{architecture.name}: compile and run, backend="normfuse"'):
        fused = Difference.between(fused_model(**inputs).logits, eager)
    outcome = Outcome(architecture.name, report, plain, fused, allowed_distance(plain, eager))
    if device == "cuda":
        for tokens in TIMED_TOKENS:
            with steps.step(f"{architecture.name}: time {tokens} tokens"):
                inputs["input_ids"] = token_ids(tokens).to(device)
                calls = [lambda m=m: m(**inputs) for m in (plain_model, fused_model)]
                plain_time, fused_time = median_times(calls)
                outcome.times[tokens] = plain_time, fused_time
    torch.compiler.reset()  # lets go of the model
    return outcome


def median_times(calls: Sequence[Callable[[], Any]], rounds: int = 50) -> list[float]:
    """Milliseconds of GPU time of each call, taken in turns so that clock rates hit all alike."""
    for call in calls:  # compiles for this shape
        call()
        call()
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds):
        for call, samples in zip(calls, times, strict=True):
            start, end = (torch.Event("cuda", enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            end.synchronize()
            samples.append(start.elapsed_time(end))
    return [statistics.median(samples) for samples in times]


def summary(outcomes: Sequence[Outcome]) -> Table:
    """One row for each architecture."""
    title = "Largest distance from eager (share of changed elements)"
    table = Table(title=title, title_justify="left")
    table.add_column("architecture")
    for heading in ("norms fused", "torch.compile", "normfuse", "allowed"):
        table.add_column(heading, justify="right")
    table.add_column("")
    for outcome in outcomes:
        table.add_row(
            outcome.name,
            f"{outcome.report.num_fused} of {outcome.report.num_sites}",
            f"{outcome.plain.largest:.3g} ({outcome.plain.changed:.0%})",
            f"{outcome.fused.largest:.3g} ({outcome.fused.changed:.0%})",
            f"{outcome.bound:.3g}",
            "[green]ok[/]" if outcome.is_within_bound else "[bold red]too far[/]",
        )
    return table


def timings(outcomes: Sequence[Outcome]) -> Table:
    """One row for each architecture and number of tokens."""
    title = f"Median time of a forward pass on {torch.cuda.get_device_name()}"
    table = Table(title=title, title_justify="left")
    table.add_column("architecture")
    for heading in ("tokens", "torch.compile", "normfuse", "speed-up"):
        table.add_column(heading, justify="right")
    for outcome in outcomes:
        for tokens, (plain, fused) in outcome.times.items():
            row = (str(tokens), f"{plain:.3f} ms", f"{fused:.3f} ms", f"{plain / fused:.2f}x")
            table.add_row(outcome.name, *row)
    return table


def main(architectures: Sequence[Architecture] = ARCHITECTURES) -> int:
    """Runs the demo; returns the exit status."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=120)  # a log: keep the rows of tables in one piece
    try:
        import transformers
    except ImportError as error:
        console.print(f"transformers must be installed, got '{error}'", markup=False)
        console.print("pip install 'normfuse[hf]'", markup=False)
        return 1
    transformers.logging.set_verbosity_error()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    where = torch.cuda.get_device_name() if device == "cuda" else f"{os.cpu_count()} CPU cores"
    console.print(f"normfuse {normfuse.__version__}, torch {torch.__version__}, {where}\n")
    steps_each = 5 + (len(TIMED_TOKENS) if device == "cuda" else 0)
    steps = Steps(console, steps_each * len(architectures))
    with steps.progress, torch.no_grad():
        outcomes = [examine(architecture, device, steps) for architecture in architectures]
    console.print()
    console.print(summary(outcomes))
    if device == "cuda":
        console.print(timings(outcomes))
    return verdict(console, outcomes, time.monotonic() - steps.start)


def verdict(console: Console, outcomes: Sequence[Outcome], seconds: float) -> int:
    """The last words; returns the exit status."""
    failed = [outcome.name for outcome in outcomes if not outcome.is_within_bound]
    if failed:
        console.print(f"[bold red]Too far from eager: {', '.join(failed)}.[/]")
        return 1
    console.print(f"All within the allowed distance of eager, in {seconds:.0f} s.")
    console.print(
        "Next: [bold]python -m normfuse explain qwen3[/], or any model type or model of yours."
    )
    return 0


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    sys.exit(main())
