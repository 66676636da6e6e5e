"""What torch's own tools for looking into a compilation show of ours."""

import json
import os
import subprocess
import sys

import pytest

PROGRAM = """
import torch
options = {"normfuse.lowering": "op", "disable_cpp_codegen": True}
with torch.no_grad():
    torch.compile(torch.nn.RMSNorm(8), backend="normfuse", options=options)(torch.randn(2, 8))
"""


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    """The trace file and the standard error of a compilation with torch's logs switched on."""
    directory = tmp_path_factory.mktemp("trace")
    settings = {
        "TORCH_TRACE": str(directory),
        "TORCH_LOGS": "+normfuse",
        "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1",
    }
    process = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**os.environ, **settings},
        stderr=subprocess.PIPE,
        text=True,
        check=True,
    )
    (trace,) = directory.iterdir()
    return trace.read_text().splitlines(), process.stderr


def artifacts(lines):
    """Name and text of our artifacts: a line of JSON, then the text, behind tabs."""
    found = {}
    for number, line in enumerate(lines):
        if '"name": "normfuse_' in line:
            name = json.loads(line[line.index("{") :])["artifact"]["name"]
            rest = lines[number + 1 :]
            length = next(i for i, text in enumerate([*rest, ""]) if not text.startswith("\t"))
            found[name] = "\n".join(rest[:length])
    return found


@pytest.mark.guarantee
def test_torch_trace_has_our_graphs(logs):
    found = artifacts(logs[0])

    assert list(found) == [
        "normfuse_before",
        "normfuse_recognised_before_autograd",
        "normfuse_recognised_after_autograd",
        "normfuse_after",
    ]
    assert "torch.rms_norm(" in found.pop("normfuse_before")
    assert all("torch.ops.normfuse.rms_norm.default(" in text for text in found.values())


@pytest.mark.guarantee
def test_torch_logs_knows_our_logger(logs):
    (line,) = [line for line in logs[1].splitlines() if "lowered" in line]

    assert "normfuse/passes/lower.py" in line
    assert line.endswith("lowered 1 as op")
