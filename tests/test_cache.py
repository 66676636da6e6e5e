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
from normfuse.passes import inductor
from normfuse.passes.inductor import HOOKS, digest_of_sources
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


def compile_elsewhere(cache, *all_options, package=PACKAGE, artifacts=None):
    """Compile a norm in a new process, once for each of `all_options`.

    Returns what its caches said each time, and what `torch.compiler.save_cache_artifacts` made of
    it; that of another process, `artifacts`, is loaded first.
    """
    path = os.pathsep.join([str(package.parent), str(REPOSITORY)])
    process = subprocess.run(
        [sys.executable, "-c", "import tests.test_cache as here; here.compile_here()"],
        env={**os.environ, "PYTHONPATH": path, "TORCHINDUCTOR_CACHE_DIR": str(cache)},
        input=pickle.dumps((all_options, artifacts)),
        stdout=subprocess.PIPE,
        cwd=cache,
        check=True,
    )
    used_package, results, saved = pickle.loads(process.stdout)
    assert Path(used_package) == package
    for options, y, _ in results:
        assert_right(y, options)
    return [words for _, _, words in results], saved


def compile_here():
    """The new process: options and artifacts from its input, results to its output."""
    all_options, artifacts = pickle.load(sys.stdin.buffer)
    if artifacts is not None:
        torch.compiler.load_cache_artifacts(artifacts)
    results = []
    for options in all_options:
        torch._dynamo.reset()
        counters.clear()
        norm, x = norm_and_input()
        y = torch.compile(norm, backend="normfuse", options=options)(x)
        results.append((options, y, words_of_caches()))
    saved = torch.compiler.save_cache_artifacts()
    pickle.dump((str(PACKAGE), results, saved and saved[0]), sys.stdout.buffer)


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
def first(tmp_path_factory):
    """The cache directory that a first process has filled, and the artifacts that it saved."""
    directory = tmp_path_factory.mktemp("cache")
    words, artifacts = compile_elsewhere(directory, OP)
    assert words == [MISS]
    return directory, artifacts


@pytest.fixture
def changed_package(tmp_path):
    """The package with another kernel source."""
    package = shutil.copytree(PACKAGE, tmp_path / "changed" / "normfuse")
    with (package / "ops/kernels/row.py").open("a") as file:
        file.write("# changed\n")
    return package


@pytest.mark.guarantee
def test_a_second_process_hits_what_is_the_same(first):
    users = {**OP, "post_grad_custom_post_pass": do_nothing}

    words, _ = compile_elsewhere(first[0], OP, INLINE, FAST, users)

    assert words == [HIT, MISS, MISS, BYPASS]


@pytest.mark.guarantee
def test_saved_artifacts_hit_with_the_same_sources_wherever_they_are(first, tmp_path):
    package = shutil.copytree(PACKAGE, tmp_path / "copy" / "normfuse")

    words, _ = compile_elsewhere(tmp_path, OP, FAST, package=package, artifacts=first[1])

    assert words == [HIT, MISS]


@pytest.mark.guarantee
def test_a_changed_source_misses_in_the_cache(first, changed_package):
    words, _ = compile_elsewhere(first[0], OP, package=changed_package)

    assert words == [MISS]


@pytest.mark.guarantee
def test_a_changed_source_misses_in_saved_artifacts(first, changed_package, tmp_path):
    words, _ = compile_elsewhere(tmp_path, OP, package=changed_package, artifacts=first[1])

    assert words == [MISS]


def change_a_kernel(package):
    with (package / "ops/kernels/row.py").open("a") as file:
        file.write("# changed\n")


def add_a_table(package):
    (package / "ops/kernels/launches.json").write_text("{}")


def change_a_table(package):
    (package / "cli/doctor.json").write_text("{}")


def rename_a_source(package):
    (package / "ops/gating.py").rename(package / "ops/gates.py")


@pytest.mark.guarantee
@pytest.mark.parametrize("change", [change_a_kernel, add_a_table, change_a_table, rename_a_source])
def test_every_source_and_table_is_in_the_digest(change, tmp_path):
    package = shutil.copytree(PACKAGE, tmp_path / "normfuse")
    before = digest_of_sources(package)

    change(package)

    assert digest_of_sources(package) != before


@pytest.mark.guarantee
def test_the_digest_is_in_the_identity_of_every_pass(monkeypatch):
    passes = normfuse.options()
    before = [passes[hook].uuid() for hook in HOOKS]

    monkeypatch.setattr(inductor, "SOURCES", "other sources")

    after = [passes[hook].uuid() for hook in HOOKS]
    assert all(one != other for one, other in zip(before, after, strict=True))


@pytest.mark.guarantee
@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize(
    "changed",
    [
        {"lowering": "op"},
        {"numerics": "fast"},
        {"rules": ["rms_norm"]},
        {"skip": ["add_rms_norm"]},
        {"check": "sample"},
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


@pytest.mark.guarantee
@pytest.mark.parametrize("hook", HOOKS)
def test_the_identity_of_the_users_pass_is_in_that_of_the_chain(hook):
    def identity(*passes):
        return normfuse.options(**{hook: list(passes)})[hook].uuid()

    assert identity(UsersPass("one")) == identity(UsersPass("one"))
    assert identity(UsersPass("one")) != identity(UsersPass("two"))
    assert identity(UsersPass("one")) != normfuse.options()[hook].uuid()
    assert identity(UsersPass("one"), UsersPass(None)) is None
    assert identity(UsersPass("one"), lambda graph: None) is None
