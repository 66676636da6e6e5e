"""`bench`: what is measured, against whom, how, and what comes of it, a module for each."""

from normfuse.cli.bench.command import add_parser, run

__all__ = ["add_parser", "run"]
