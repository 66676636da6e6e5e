"""What our passes cost: their share of the compile time of a deep, tiny model, and how it grows.

    python benchmarks/compile_time.py --layers 48 96 --out benchmarks/results/compile_time.json
    python benchmarks/compile_time.py --layers 48 --model gemma4_text --config '{"num_experts": 4}'

Caches are off. Each depth is compiled in a process of its own, once plainly and once with normfuse,
which also counts the seconds inside our passes.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"

import torch
from rich.console import Console
from rich.table import Table


def tiny_model(model_type: str, config: dict[str, object], layers: int) -> torch.nn.Module:
    """A transformers model type at tiny widths, with random weights and some settings of its own"""
    from normfuse.cli import tiny_models

    config_class = tiny_models.transformers().CONFIG_MAPPING[model_type]
    settings = tiny_models.tiny_config(config_class, layers)
    for name, value in config.items():
        setattr(settings, name, value)
    torch.manual_seed(0)
    return tiny_models._auto_class(model_type).from_config(settings).eval().bfloat16()


def measure(
    layers: int, lowering: str | None, device: str, model_type: str, config: dict[str, object]
) -> dict[str, float]:
    """Seconds of a first call and of our passes inside it; no lowering is plain Inductor."""
    from normfuse.backend import patches
    from normfuse.passes import inductor

    seconds = dict.fromkeys(inductor.HOOKS, 0.0)
    options: dict[str, object] = {}
    if lowering is not None:
        ours = patches(None, {"normfuse.lowering": lowering})
        options = {hook: timed(hook, ours[hook], seconds) for hook in inductor.HOOKS}
    # Imports and compile workers are not what is measured.
    torch.compile(lambda x: x.sin().sum() + 1)(torch.ones(8, device=device))
    model = tiny_model(model_type, config, layers).to(device)
    ids = torch.randint(3, 100, (2, 16), device=device)
    with torch.no_grad():
        start = time.perf_counter()
        torch.compile(model, dynamic=False, options=options)(input_ids=ids, use_cache=False)
        total = time.perf_counter() - start
    return {"total": total, **seconds}


def timed(hook, function, seconds):
    """A pass that adds its time to `seconds[hook]`."""
    from normfuse.passes import inductor

    def run(graph):
        start = time.perf_counter()
        function(graph)
        seconds[hook] += time.perf_counter() - start

    return inductor.Hook(run, f"timed {hook}")


def in_a_process(
    arguments: argparse.Namespace, layers: int, lowering: str | None, device: str
) -> dict[str, float]:
    command = [sys.executable, __file__, "--one", str(layers), lowering or "plain", device]
    command += ["--model", arguments.model, "--config", arguments.config]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(result.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, nargs="+", default=[48, 96])
    parser.add_argument("--model", default="llama", help="a transformers model type")
    parser.add_argument("--config", default="{}", help="settings of its configuration, as JSON")
    parser.add_argument("--skip-plain", action="store_true", help="do not time plain Inductor")
    parser.add_argument("--lowering", default="inline", choices=("inline", "triton", "op"))
    parser.add_argument("--repeats", type=int, default=1, help="processes; medians are kept")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        layers, lowering, device = arguments.one
        chosen = None if lowering == "plain" else lowering
        config = json.loads(arguments.config)
        print(json.dumps(measure(int(layers), chosen, device, arguments.model, config)))
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = []
    for layers in arguments.layers:
        times = {
            lowering: median(
                [
                    in_a_process(arguments, layers, lowering, device)
                    for _ in range(arguments.repeats)
                ]
            )
            for lowering in ([] if arguments.skip_plain else [None]) + [arguments.lowering]
        }
        plain, ours = times.get(None, {"total": None}), times[arguments.lowering]
        passes = sum(value for name, value in ours.items() if name != "total")
        rows.append(
            {
                "layers": layers,
                "plain_s": plain["total"],
                "normfuse_s": ours["total"],
                "passes_s": passes,
                "share": passes / ours["total"],
                "by_pass": {name: value for name, value in ours.items() if name != "total"},
            }
        )
    report(rows, arguments, device)


def median(runs: list[dict[str, float]]) -> dict[str, float]:
    """The run with the median total."""
    return sorted(runs, key=lambda run: run["total"])[len(runs) // 2]


def report(rows, arguments, device) -> None:
    table = Table("layers", "plain Inductor s", "normfuse s", "our passes s", "share")
    for row in rows:
        table.add_row(
            str(row["layers"]),
            "" if row["plain_s"] is None else f"{row['plain_s']:.1f}",
            f"{row['normfuse_s']:.1f}",
            f"{row['passes_s']:.3f}",
            f"{row['share']:.2%}",
        )
    Console().print(table)
    growth = rows[-1]["passes_s"] / rows[0]["passes_s"]
    print(f"{rows[-1]['layers']} layers cost {growth:.2f} times as much as {rows[0]['layers']}")
    if arguments.out:
        arguments.out.write_text(
            json.dumps(
                {
                    "command": "python benchmarks/compile_time.py " + " ".join(sys.argv[1:]),
                    "torch": torch.__version__,
                    "python": platform.python_version(),
                    "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
                    "lowering": arguments.lowering,
                    "rows": rows,
                    "growth": growth,
                },
                indent=2,
            )
            + "\n"
        )


if __name__ == "__main__":
    main()
