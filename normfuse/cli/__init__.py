"""The command line, `python -m normfuse`: one module for each subcommand.

Each has `add_parser(subparsers)`, which describes its arguments, and `run(args) -> int`, which
returns the exit status. `normfuse.__main__` lists them.
"""
