"""The command line: `python -m normfuse`, or `normfuse` once installed."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

import torch

import normfuse
from normfuse.cli import bench, bisect, doctor, explain, tune
from normfuse.cli.errors import UsageError

SUBCOMMANDS = (explain, bisect, tune, doctor, bench)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status: 0, 1 for a failed check, 2 for wrong usage."""
    parser = argparse.ArgumentParser(
        prog="normfuse",
        description="normfuse fuses the chains around RMSNorm of unmodified PyTorch models: "
        'torch.compile(model, backend="normfuse").',
    )
    parser.add_argument("--version", action="version", version=_versions())
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in SUBCOMMANDS:
        command.add_parser(subparsers)
    args = parser.parse_args(argv)
    try:
        status: int = args.run(args)
    except UsageError as error:
        print(f"normfuse: error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader has seen enough, as in `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return status


def _versions() -> str:
    return f"normfuse {normfuse.__version__} (torch {torch.__version__})"


if __name__ == "__main__":
    sys.exit(main())
