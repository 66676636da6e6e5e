"""The README's table of rules, made from `normfuse.patterns.RULES`.

python tools/rules_table.py            # print it
python tools/rules_table.py --write    # put it into README.md
"""

from __future__ import annotations

import sys
from pathlib import Path

from normfuse.patterns import RULES

README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- rules:begin -->\n", "<!-- rules:end -->"


def table() -> str:
    """One row a rule, in the order in which they are applied."""
    rows = [f"| {rule.before} | `{rule.name}` | {rule.families} |" for rule in RULES]
    return "\n".join(["| chain | op | model families |", "|---|---|---|", *rows]) + "\n"


def with_table(text: str) -> str:
    """A README with its table renewed."""
    head, rest = text.split(BEGIN)
    _, tail = rest.split(END)
    return head + BEGIN + table() + END + tail


if __name__ == "__main__":
    if "--write" in sys.argv:
        README.write_text(with_table(README.read_text()))
    else:
        print(table(), end="")
