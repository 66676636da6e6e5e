"""A block, exported and packaged, and run by a process that knows nothing of normfuse."""

import os
import subprocess
import sys

import torch

import normfuse
from tests.blocks import GemmaBlock, activation

PROGRAM = """
import sys, torch
package, inputs, results = sys.argv[1:]
model = torch._inductor.aoti_load_package(package)
torch.save([model(*pair) for pair in torch.load(inputs)], results)
assert not [name for name in sys.modules if name.split(".")[0] == "normfuse"]
"""


def package_block(directory, device, *, plain=False, **options):
    """A Gemma block with any number of rows, as a package; and the ops that it was rewritten to.

    `plain` makes the package that Inductor makes without us.
    """
    block, seen = GemmaBlock().to(device, torch.bfloat16), []

    def note_ops(graph):
        seen[:] = [n.target._opname for n in graph.nodes if "normfuse" in str(n.target)]

    rows = torch.export.Dim("rows", min=2, max=64)
    with torch.no_grad():
        program = torch.export.export(
            block,
            (activation(4).to(device), activation(4).to(device)),
            dynamic_shapes=({0: rows}, {0: rows}),
        )
    ours = normfuse.options(post_grad_custom_post_pass=note_ops, **options)
    package = torch._inductor.aoti_compile_and_package(
        program,
        package_path=str(directory / ("plain.pt2" if plain else "block.pt2")),
        inductor_configs={} if plain else ours,
    )
    return block, package, seen


def run_elsewhere(package, pairs, directory):
    """The results of a package for pairs of inputs, from a process that never imports normfuse.

    Raises:
        AssertionError: the process failed.
    """
    inputs, results = directory / "inputs.pt", directory / "results.pt"
    torch.save(pairs, inputs)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    # A crash of generated code says nothing by itself: where it happened is asked for.
    command = [sys.executable, "-X", "faulthandler", "-c", PROGRAM, package]
    command += [str(inputs), str(results)]
    process = subprocess.run(
        command, capture_output=True, text=True, cwd=directory, env=environment
    )
    assert process.returncode == 0, f"exit status {process.returncode}: {process.stderr}"
    return torch.load(results)
