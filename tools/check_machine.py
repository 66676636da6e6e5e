"""Says, before anything is installed, what this machine lacks for the development set-up.

Runs on the bare interpreter, so it needs nothing but the standard library.
"""

import importlib.util
import os
import shutil
import sys
import sysconfig


def _find_compiler():
    """The C++ compiler that Inductor would call on a CPU, or None."""
    candidates = [os.environ.get("CXX", "").split(" ")[0], "c++", "g++", "clang++"]
    return next((path for path in map(shutil.which, filter(None, candidates)) if path), None)


def find_gaps():
    """One sentence for each thing that is missing, with what to do about it."""
    gaps = []
    if sys.version_info < (3, 10):  # noqa: UP036  this is the check
        found = sys.version.split()[0]
        gaps.append(f"Python must be 3.10 or newer, got {found}: pass PYTHON=path/to/python3.x")
    if not all(importlib.util.find_spec(name) for name in ("venv", "ensurepip")):
        gaps.append(
            f"{sys.executable} must be able to create virtual environments, its venv module is "
            "incomplete: install it (Debian and Ubuntu: python3-venv)"
        )
    if _find_compiler() is None:
        gaps.append(
            "a C++ compiler must be on the PATH, found none: torch.compile needs it on a CPU; "
            "install one (Debian and Ubuntu: g++) or set CXX"
        )
    header = os.path.join(sysconfig.get_paths()["include"], "Python.h")
    if not os.path.exists(header):
        gaps.append(
            f"Python's C headers must be installed, {header} is missing: torch.compile builds "
            "against them (Debian and Ubuntu: python3-dev)"
        )
    return gaps


if __name__ == "__main__":
    gaps = find_gaps()
    for gap in gaps:
        print(f"error: {gap}", file=sys.stderr)
    sys.exit(1 if gaps else 0)
