"""The README's table of whole models, made from a record of `benchmarks/models.py`.

python tools/models_table.py            # print it
python tools/models_table.py --write    # put it into README.md
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import geometric_mean
from textwrap import fill
from typing import Any

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
RECORD = ROOT / "benchmarks" / "results" / "models_h200.json"
BEGIN, END = "<!-- models:begin -->\n", "<!-- models:end -->"

CELLS = {
    "prefill512": "prefill 512",
    "prefill4096": "prefill 4096",
    "decode1": "decode 1",
    "decode64": "decode 64",
}
HEAD = f"| model | {' | '.join(CELLS.values())} | its Triton kernels | their share |\n"
RULE = f"|{'---|' * (len(CELLS) + 3)}\n"

UNBROKEN: Any = {"break_long_words": False, "break_on_hyphens": False}

Row = dict[str, Any]


def section(record: dict[str, Any]) -> str:
    """What a record says, as Markdown: where and how it was measured, then one row a model.

    Raises:
        ValueError: the record is of tiny models or of a CPU.
    """
    if not record["measured"]:
        raise ValueError(
            "the record must be measured, got a trial: run benchmarks/models.py on a GPU"
        )
    models = dict.fromkeys(row["model"] for row in record["rows"])
    lines = [_line(f"`{name}`", _of(record, name)) for name in models]
    return f"{_introduction(record)}\n\n{HEAD}{RULE}{''.join(lines)}{_line('all', record['rows'])}"


def _introduction(record: dict[str, Any]) -> str:
    place = RECORD.relative_to(ROOT).as_posix()
    sentences = [
        f"- **Whole models**, bf16, {record['layers']} layers, real widths, CUDA graphs: GPU time "
        f"of plain `torch.compile` over that of `auto`, on one {record['gpu']}, torch "
        f"{record['torch']}, triton {record['triton']}, transformers {record['transformers']}.",
        *_findings(record["summary"]),
        f"Cells without a number: {len(record['not_reached']) + len(record['summary']['failed'])}.",
        f"From [{RECORD.name}]({place}), by",
    ]
    text = fill(" ".join(sentences), 100, subsequent_indent="  ", **UNBROKEN)
    return f"{text}\n  `{record['command']}`."


def _findings(summary: dict[str, Any]) -> Iterator[str]:
    """A sentence for each number that the run has."""
    model, cell, worst = summary["worst"]
    times = {name: f"{value:.3f}x" for name, value in summary.items() if isinstance(value, float)}
    yield (
        f"Geometric mean {times['speedup']}, of models with QK-norm {times['speedup_qk_norm']}; "
        f"the worst is {model} {CELLS[cell]} at {worst:.3f}x."
    )
    if "compiled_speedup" in times:
        yield (
            "All kernels in Triton, norms and whatever else Inductor generates, are "
            f"{times['compiled_speedup']} as fast."
        )
    if "cost_ratio" in times:
        yield (
            f"Norms and RoPE cost {times['cost_ratio']} of what they cost plain `torch.compile`; "
            "if they cost nothing, models without experts would be "
            f"{times['speedup_if_norms_cost_nothing']} as fast, those of them with QK-norm "
            f"{times['speedup_if_norms_cost_nothing_qk_norm']}."
        )
    if "compile_time_ratio" in times:
        yield f"Compiling takes {times['compile_time_ratio']} as long."


def _of(record: dict[str, Any], model: str) -> list[Row]:
    return [row for row in record["rows"] if row["model"] == model]


def _line(name: str, rows: list[Row]) -> str:
    by_cell = [_mean([row for row in rows if row["cell"] == cell], "gpu_ms") for cell in CELLS]
    columns = [name, *map(_times, by_cell), _times(_mean(rows, "compiled_us")), _shares(rows)]
    return f"| {' | '.join(columns)} |\n"


def _mean(rows: list[Row], field: str) -> float | None:
    """The geometric mean of plain over auto; None where nothing was measured."""
    pairs = [[_value(row, name, field) for name in ("plain", "auto")] for row in rows]
    found = [plain / ours for plain, ours in pairs if plain and ours]
    return geometric_mean(found) if found else None


def _shares(rows: list[Row]) -> str:
    """The Triton kernels' mean share of the GPU time, without and with us."""
    columns = [[_share(row, name) for row in rows] for name in ("plain", "auto")]
    known = [[one for one in values if one is not None] for values in columns]
    if not all(known):
        return ""
    return " -> ".join(f"{100 * sum(values) / len(values):.0f} %" for values in known)


def _share(row: Row, contender: str) -> float | None:
    part, all_of_it = (_value(row, contender, name) for name in ("compiled_us", "kernels_us"))
    return part / all_of_it if part and all_of_it else None


def _value(row: Row, contender: str, field: str) -> float | None:
    value: float | None = row.get("contenders", {}).get(contender, {}).get(field)
    return value


def _times(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}x"


def with_section(text: str, record: dict[str, Any] | None) -> str:
    """A README with its section renewed; as it is if nothing was measured yet."""
    if record is None:
        return text
    head, rest = text.split(BEGIN)
    _, tail = rest.split(END)
    return head + BEGIN + section(record) + END + tail


def committed() -> dict[str, Any] | None:
    """The record that the README shows; None for one of an earlier form of the benchmark."""
    found: dict[str, Any] = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    return found if "summary" in found else None


if __name__ == "__main__":
    if "--write" in sys.argv:
        README.write_text(with_section(README.read_text(), committed()))
    else:
        record = committed()
        print("nothing was measured yet" if record is None else section(record), end="")
