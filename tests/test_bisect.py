"""`python -m normfuse bisect`: planted faults are found, and nothing where there is none."""

import json
from itertools import combinations

import pytest
import torch
import torch._inductor.config
from torch import nn

from normfuse.__main__ import main
from normfuse.cli import bisect
from normfuse.cli.bisection import FusedSite, Trials, differences, smallest_set
from normfuse.cli.subject import Subject
from normfuse.ops import ADD_RMS_NORM
from tests import blocks
from tests.planted import planted

WIDTHS = (16, 24, 32)


class Narrowing(nn.Module):
    """A norm behind a sum for every width."""

    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList(blocks.LlamaRMSNorm(width) for width in WIDTHS)
        self.noise = 0.0

    def forward(self, x):
        total = 0
        for norm, width in zip(self.norms, WIDTHS, strict=True):
            narrow = x[:, :width]
            total = total + norm(narrow + narrow.flip(0)).sum(-1)
        return total + self.noise * torch.rand_like(total), x


@pytest.fixture(autouse=True)
def model(monkeypatch):
    """What MODEL is in every test."""
    monkeypatch.setenv("COLUMNS", "140")
    model = Narrowing().bfloat16().eval()
    x = torch.randn(4, max(WIDTHS)).bfloat16()
    monkeypatch.setattr(bisect, "load", lambda *_: Subject("narrowing", model, (x,), {}))
    return model


def is_wide(*widths):
    return lambda x, *_: x.shape[-1] in widths


def double(y):
    return y * 2


def run(capsys, *argv):
    """Exit status and the JSON document."""
    status = main(["bisect", "narrowing", "--lowering", "op", "--json", *argv])
    return status, json.loads(capsys.readouterr().out)


def modules(document):
    return [[site["module"] for site in culprit["sites"]] for culprit in document["culprits"]]


def test_a_right_model(capsys):
    status, document = run(capsys)

    assert status == 0
    assert (document["schema"], document["num_sites"], document["num_runs"]) == (1, 3, 3)
    assert document["fused"] == document["allowed"] == [0.0, 0.0]
    assert document["culprits"] == []


@pytest.mark.guarantee
def test_a_planted_fault_is_found(capsys):
    with planted(ADD_RMS_NORM, double, is_wide(32)):
        status, document = run(capsys)

    assert status == 1
    assert modules(document) == [["norms.2"]]
    ((site,),) = [culprit["sites"] for culprit in document["culprits"]]
    assert (site["op"], site["lowering"]) == ("add_rms_norm", "op")
    assert site["source"].partition(":")[0].endswith("blocks.py")
    assert document["fused"][0] > 0 == document["fused"][1]
    assert document["culprits"][0]["alone"][0] > 0
    assert document["after"] == [0.0, 0.0]
    assert document["num_runs"] <= 3 + 2 * 2 + 1  # two halvings at most, and all others


def test_all_faults_are_found_one_after_the_other(capsys):
    with planted(ADD_RMS_NORM, double, is_wide(16, 32)):
        status, document = run(capsys, "--all")

    assert status == 1
    assert modules(document) == [["norms.0"], ["norms.2"]]
    assert document["after"] == [0.0, 0.0]


def test_the_first_of_two_faults_and_its_numbers_are_printed(capsys):
    with planted(ADD_RMS_NORM, double, is_wide(16, 24)):
        assert main(["bisect", "narrowing", "--lowering", "op"]) == 1

    output = capsys.readouterr().out
    assert "norms.0: add_rms_norm, op, " in output
    assert "norms.1" not in output
    assert "without it, an output is still beyond the tolerance: --all goes on" in output
    assert all(word in output for word in ("allowed", "all fused", "found fused", "found inline"))


def test_a_tolerance_is_a_share_of_the_largest_element(capsys):
    with planted(ADD_RMS_NORM, lambda y: y * (1 + 2**-6), is_wide(32)):
        status, document = run(capsys, "--tolerance", "0.5")

    assert status == 0
    assert document["allowed"][0] == 0.5 * document["magnitudes"][0] > document["fused"][0] > 0


def test_the_words_for_nothing_found(capsys):
    bisect._print(bisect.Bisection("narrowing", "op", 4, [1.0], [0.0], [0.0], after=[0.0]))
    assert "nothing beyond the tolerance, with all of 4 sites fused" in capsys.readouterr().out


@torch._inductor.config.patch(disable_cpp_codegen=True)
def test_the_tolerance_of_generated_code_is_derived(capsys):
    with planted(ADD_RMS_NORM, double, is_wide(32)):
        status, document = run(capsys, "--inductor")

    assert status == 1
    assert modules(document) == [["norms.2"]]
    assert 0 < document["allowed"][0] < 0.05 * document["magnitudes"][0]
    assert document["after"][0] <= document["allowed"][0]


def test_a_model_that_is_not_the_same_twice_is_refused(capsys, model, monkeypatch):
    model.noise = 1.0
    monkeypatch.setattr(torch, "manual_seed", lambda seed: None)

    assert main(["bisect", "narrowing", "--lowering", "op"]) == 2
    assert "narrowing must have the same outputs in every run, got" in capsys.readouterr().err


def test_wrong_arguments(capsys):
    for value in ("-1", "nan", "inf"):
        assert main(["bisect", "narrowing", "--tolerance", value]) == 2
        assert "--tolerance must be a number that is not negative" in capsys.readouterr().err


def test_a_model_that_cannot_be_float64_needs_a_tolerance(capsys, monkeypatch):
    def fail(self):
        raise RuntimeError("no double")

    monkeypatch.setattr(Trials, "exact", fail)

    assert main(["bisect", "narrowing", "--lowering", "auto"]) == 2
    assert "got RuntimeError: no double: pass --tolerance" in capsys.readouterr().err
    assert main(["bisect", "narrowing", "--lowering", "auto", "--tolerance", "0"]) == 0
    assert "no site is fused with --lowering auto" in capsys.readouterr().out


@pytest.mark.guarantee
def test_every_small_set_is_found():
    sites = [FusedSite(number, "rms_norm", "", "", "op") for number in range(6)]
    for size in (1, 2, 3):
        for culprit in combinations(sites, size):

            def is_beyond(chosen, culprit=culprit):
                return set(culprit) <= set(chosen)

            assert smallest_set(sites, is_beyond) == list(culprit)


def test_one_of_many_takes_two_runs_for_each_halving():
    sites = [FusedSite(number, "rms_norm", "", "", "op") for number in range(1024)]
    runs, ruled_out = [], []

    def is_beyond(chosen):
        runs.append(chosen)
        return sites[777] in chosen

    assert smallest_set(sites, is_beyond, ruled_out.append) == [sites[777]]
    assert len(runs) <= 20
    assert ruled_out[-1] == 1023


def test_what_is_no_number_differs_from_numbers_only():
    nan, inf, one = float("nan"), float("inf"), 1.0
    first, second = torch.tensor([nan, inf, one]), torch.tensor([nan, inf, 1.5])

    assert differences([first], [second]) == [0.5]
    assert differences([first], [torch.tensor([nan, one, one])]) == [inf]
    assert differences([torch.ones(0)], [torch.ones(0)]) == [0.0]


def test_the_help_lists_it(capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(["--help"])
    assert exit_info.value.code == 0
    assert "find the site whose fusion changes an output" in capsys.readouterr().out
