"""What `normfuse bench` puts together from other libraries' kernels."""

import pytest
import torch

from normfuse.cli.bench import contenders as contenders_of
from normfuse.cli.bench import peers as peers_of
from normfuse.cli.bench import plots, spellings
from normfuse.cli.bench.accuracy import accuracy
from normfuse.cli.bench.cells import Cell
from normfuse.cli.bench.contenders import INDUCTOR, OURS
from normfuse.cli.bench.subjects import subject


class Stub(peers_of.Peer):
    """A library whose rotation reads one half of cos and sin, and wants them in its own form."""

    name, packages, module, stems = "Stub", ("torch",), "torch", ()
    turns = modulates = True

    def norm(self, x, weight, offset):
        assert x.is_contiguous()
        return spellings.llama(x, weight + offset)

    def add_norm(self, x, residual, weight, offset):
        return self.norm(x + residual, weight, offset), x + residual

    def modulated_norm(self, x, scale, shift):
        return spellings.modulated(x, scale, shift)[0]

    def tables(self, cos, sin):
        half = cos.shape[-1] // 2
        return cos[0, :, None, :half], sin[0, :, None, :half]

    def rope(self, q, k, *tables):
        cos, sin = tables
        for x in (q, k):
            left, right = x.chunk(2, dim=-1)
            x.copy_(torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1))
        return q, k


class TestRivals:
    """What other libraries' kernels are put together to is the chain of the cell."""

    @pytest.mark.parametrize(
        ("cell", "names"),
        [
            (Cell("qk_rms_norm", 5, 128, (32, 8)), ["Stub", "F.rms_norm"]),
            (Cell("qk_rms_norm_rope", 5, 128, (32, 8)), ["Stub", "F.rms_norm + Stub"]),
            (Cell("qk_rms_norm_rope", 5, 256, (16, 8)), ["Stub", "F.rms_norm + Stub"]),
            (Cell("rope", 5, 128, (32, 8)), ["Stub"]),
            (Cell("rope", 1, 128, (32, 2)), ["Stub"]),
            (Cell("modulated_rms_norm", 8, 64), ["Stub"]),
            (Cell("rms_norm_add", 4, 64), ["Stub"]),
        ],
        ids=str,
    )
    def test_are_the_same_function(self, cell, names):
        torch.manual_seed(0)
        what = subject(cell)
        operands = what.operands("cpu")
        ours = {OURS, INDUCTOR, contenders_of.MAX_AUTOTUNE}
        rivals = contenders_of.contenders(what, (Stub(),), on_gpu=False)

        rivals = [rival for rival in rivals if rival.name not in ours]

        assert [rival.name for rival in rivals] == names
        for rival in rivals:
            results = rival.prepare()(*rival.adapt(operands))
            assert accuracy(what, operands, results).is_the_same_function, rival.name

    def test_the_halves_of_a_table_are_equal_as_in_a_model(self):
        *_, cos, sin = subject(Cell("qk_rms_norm_rope", 5, 128, (32, 8))).operands("cpu")

        for table in (cos, sin):
            left, right = table.chunk(2, dim=-1)
            assert torch.equal(left, right)
        assert not torch.equal(cos, sin)


def test_the_plot_shows_the_fastest_composition():
    times = {"Stub": 3.0, "Stub + Stub": 2.0, "F.rms_norm + Stub": None}
    cell = {"contenders": {name: {"cold_us": us} for name, us in times.items()}}

    assert plots.cold_us(cell, plots.COMPOSITION) == 2.0
    assert plots.cold_us(cell, "Stub") == 3.0
    assert plots.cold_us(cell, "Liger") is None
