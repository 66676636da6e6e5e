"""What the command line of `bench` may say."""

from __future__ import annotations

import argparse
from pathlib import Path

from normfuse.cli.bench.cells import OPS

EXAMPLES = """
examples:
  python -m normfuse bench --quick
  python -m normfuse bench --ops add_rms_norm qk_rms_norm_rope --out mine.json --plots plots
  python -m normfuse bench --time-limit 540 --out kernels.json    # the most informative cells first
  python -m normfuse bench --time-limit 540 --resume kernels.json --out kernels.json  # the others
  python -m normfuse bench --share 2/2 --out b.json               # on a second GPU, beside 1/2
  python -m normfuse bench --show a.json b.json --out kernels.json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments, also those of benchmarks/kernels.py."""
    add = parser.add_argument
    add("--quick", action="store_true", help="a few cells of every op")
    add("--ops", nargs="+", choices=OPS, default=OPS, metavar="OP", help=", ".join(OPS))
    add("--out", type=Path, metavar="FILE", help="write the record, as JSON")
    add("--plots", type=Path, metavar="DIR", help="draw one PNG for each op (needs matplotlib)")
    limit = "stop in time; cells come in order of what they tell, and the record lists the others"
    add("--time-limit", type=float, metavar="S", help=limit)
    add("--cells", nargs="+", metavar="TEXT", help="only cells whose name contains one of these")
    resumed = "measure only the cells that this record of an earlier run lacks, and keep the others"
    add("--resume", type=Path, metavar="FILE", help=resumed)
    share = "measure only every N-th cell, from the I-th on: for N GPUs of one kind side by side"
    add("--share", type=_share, default=(1, 1), metavar="I/N", help=share)
    without = "leave out contenders that broke a process before, such as 'qk_rms_norm_rope: Liger'"
    add("--without", nargs="+", default=[], metavar="'OP: NAME'", help=without)
    workers = "processes that compile beforehand (default: all cores but four; 0: none)"
    add("--workers", type=int, metavar="N", help=workers)
    cache = "keep compiled kernels there for the next run (default: a temporary directory)"
    add("--cache", type=Path, metavar="DIR", help=cache)
    shown = (
        "measure nothing: print, with --plots draw and with --out write, a record made before, or "
        "what several make together"
    )
    add("--show", nargs="+", type=Path, metavar="FILE", help=shown)
    dry = "without a GPU: walk through everything at tiny sizes; the times are made up"
    add("--dry-run", action="store_true", help=dry)


def _share(text: str) -> tuple[int, int]:
    """(1, 2) of "1/2"."""
    index, _, count = text.partition("/")
    if not (index.isdigit() and count.isdigit() and 1 <= int(index) <= int(count)):
        raise argparse.ArgumentTypeError(
            f"a share must be I/N with 1 <= I <= N, got {text}: write 1/2 and 2/2 for two GPUs"
        )
    return int(index), int(count)
