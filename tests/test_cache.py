"""Inductor's caches across processes: hits where nothing changed, misses where we changed.

A pass is no part of what Inductor hashes. What it knows of ours is their `uuid()`, and a stale one
would bring back the results of old code without a word.
"""

import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters
from torch._inductor.custom_graph_pass import CustomGraphPass

import normfuse
from normfuse.passes.inductor import HOOKS
from tests import float64
from tests.blocks import LlamaRMSNorm
from tests.float64 import assert_as_close_as_eager

REPOSITORY = Path(__file__).parent.parent
PACKAGE = Path(normfuse.__file__).parent
WITHOUT_CODE = {"disable_cpp_codegen": True}  # the C++ compiler takes longer than all the rest
OP = {"normfuse.lowering": "op", **WITHOUT_CODE}
INLINE = {"normfuse.lowering": "inline", **WITHOUT_CODE}
FAST = {"normfuse.numerics": "fast", **OP}
HIT, MISS, BYPASS = ({"autograd": word, "graph": word} for word in ("hit", "miss", "bypass"))


def norm_and_input():
    torch.manual_seed(0)
    norm = LlamaRMSNorm(64).bfloat16().requires_grad_(False)
    return norm, torch.randn(16, 64).bfloat16()


def compile_elsewhere(cache, *all_options, package=PACKAGE):
    """Compile a norm in a new process, once for each of `all_options`; what its caches said."""
    path = os.pathsep.join([str(package.parent), str(REPOSITORY)])
    process = subprocess.run(
        [sys.executable, "-c", "import tests.test_cache as here; here.compile_here()"],
        env={**os.environ, "PYTHONPATH": path, "TORCHINDUCTOR_CACHE_DIR": str(cache)},
        input=pickle.dumps(all_options),
        stdout=subprocess.PIPE,
        cwd=cache,
        check=True,
    )
    used_package, results = pickle.loads(process.stdout)
    assert Path(used_package) == package
    for options, y, _ in results:
        assert_right(y, options)
    return [words for _, _, words in results]


def compile_here():
    """The new process: options from its input, results to its output."""
    results = []
    for options in pickle.load(sys.stdin.buffer):
        torch._dynamo.reset()
        counters.clear()
        norm, x = norm_and_input()
        y = torch.compile(norm, backend="normfuse", options=options)(x)
        results.append((options, y, words_of_caches()))
    pickle.dump((str(PACKAGE), results), sys.stdout.buffer)


def words_of_caches():
    """What the caches of autograd and of the graph said, such as {"autograd": "hit", ...}"""
    said = {**counters["aot_autograd"], **counters["inductor"]}
    caches = {"autograd": "autograd_cache", "graph": "fxgraph_cache"}
    return {
        name: word
        for name, prefix in caches.items()
        for word in ("hit", "miss", "bypass")
        if said.get(f"{prefix}_{word}")
    }


def assert_right(y, options):
    norm, x = norm_and_input()
    exact = float64.rms_norm(x, norm.weight, norm.variance_epsilon, 0.0)
    assert_as_close_as_eager(y, norm(x), exact)
    assert torch.equal(y, norm(x)) or options == FAST


def do_nothing(graph):
    """A user's pass without identity: Inductor cannot know what it does."""


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A cache directory that a first process has filled."""
    directory = tmp_path_factory.mktemp("cache")
    assert compile_elsewhere(directory, OP) == [MISS]
    return directory


def test_a_second_process_hits_what_is_the_same(cache):
    users = {**OP, "post_grad_custom_post_pass": do_nothing}

    words = compile_elsewhere(cache, OP, INLINE, FAST, users)

    assert words == [HIT, MISS, MISS, BYPASS]


def test_the_same_sources_at_another_place_hit(cache, tmp_path):
    package = shutil.copytree(PACKAGE, tmp_path / "normfuse")

    assert compile_elsewhere(cache, OP, package=package) == [HIT]


@pytest.mark.parametrize("source", ["ops/kernels/row.py", "ops/rms_norm.py"])
def test_a_changed_source_misses(cache, tmp_path, source):
    package = shutil.copytree(PACKAGE, tmp_path / "normfuse")
    with (package / source).open("a") as file:
        file.write("# changed\n")

    assert compile_elsewhere(cache, OP, package=package) == [MISS]


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize(
    "changed",
    [
        {"lowering": "op"},
        {"numerics": "fast"},
        {"rules": ["rms_norm"]},
        {"skip": ["add_rms_norm"]},
    ],
    ids=str,
)
def test_every_option_is_in_the_identity_of_every_pass(hook, changed):
    default, other = normfuse.options()[hook], normfuse.options(**changed)[hook]

    assert default.uuid() != other.uuid()
    assert other.uuid() == normfuse.options(**changed)[hook].uuid()


class UsersPass(CustomGraphPass):
    def __init__(self, identity):
        self.identity = identity

    def __call__(self, graph):
        pass

    def uuid(self):
        return self.identity


@pytest.mark.parametrize("hook", HOOKS)
def test_the_identity_of_the_users_pass_is_in_that_of_the_chain(hook):
    def identity(*passes):
        return normfuse.options(**{hook: list(passes)})[hook].uuid()

    assert identity(UsersPass("one")) == identity(UsersPass("one"))
    assert identity(UsersPass("one")) != identity(UsersPass("two"))
    assert identity(UsersPass("one")) != normfuse.options()[hook].uuid()
    assert identity(UsersPass("one"), UsersPass(None)) is None
    assert identity(UsersPass("one"), lambda graph: None) is None
