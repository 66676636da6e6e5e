"""Writes before autograd: replaced where nothing else sees them, kept where something does."""

import pytest
import torch
from torch import nn

from normfuse.explain import explain_with
from tests.blocks import GemmaRMSNorm, activation


class Scaled(nn.Module):
    """The end of a Gemma 4 layer, and the norm that begins the next: the sum is scaled in place."""

    def __init__(self, change):
        super().__init__()
        self.change = change
        self.first, self.second = GemmaRMSNorm(), GemmaRMSNorm()
        self.register_buffer("scale", torch.tensor([0.5]))

    def forward(self, x, residual):
        total = residual + self.first(x)
        total, seen = self.change(total, self.scale)
        return self.second(total), total, seen


def by_operator(total, scale):
    total *= scale
    return total, None


def by_method(total, scale):
    return total.mul_(0.5), None


def read_before(total, scale):
    before = total + 1
    total *= scale
    return total, before


def read_through_a_view(total, scale):
    view = total.view(-1)
    total *= scale
    return total, view * 1


def read_by_its_old_name(total, scale):
    result = total.mul_(scale)
    return result, total + 1


def without_gradients(total, scale):
    with torch.no_grad():
        total *= scale
    return total, None


def after_a_region_without_gradients(total, scale):
    with torch.no_grad():
        factor = scale + 1
    total *= factor
    return total, None


def twice(total, scale):
    total *= scale
    total += 1
    return total, None


def of_an_input(total, scale):
    scale = scale.clone()
    scale *= 2
    return total * scale, scale


CHANGES = [by_operator, by_method, read_before, read_through_a_view, read_by_its_old_name]
CHANGES += [without_gradients, after_a_region_without_gradients, twice, of_an_input]


def ops(block, *inputs):
    report = explain_with(block, inputs, options={"normfuse.lowering": "op"})
    return {site.op for site in report.sites}


@pytest.mark.parametrize("change", [by_operator, by_method, after_a_region_without_gradients])
def test_a_sum_scaled_in_place_is_joined_in_training(change):
    inputs = [activation(2, 3).requires_grad_() for _ in range(2)]

    assert ops(Scaled(change).bfloat16(), *inputs) == {"rms_norm_add_rms_norm"}


def test_not_where_the_sum_is_read_under_another_name():
    inputs = [activation(2, 3).requires_grad_() for _ in range(2)]

    assert ops(Scaled(read_through_a_view).bfloat16(), *inputs) != {"rms_norm_add_rms_norm"}


def test_within_no_grad_it_waits_for_the_graph_after_autograd():
    """There is one in inference alone."""
    inputs = [activation(2, 3) for _ in range(2)]

    with torch.no_grad():
        assert ops(Scaled(without_gradients).bfloat16(), *inputs) == {"rms_norm_add_rms_norm"}


@pytest.mark.guarantee
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("change", CHANGES)
def test_results_and_gradients_are_those_of_eager(change, training):
    block = Scaled(change)
    values = [activation(2, 3, dtype=torch.float32) for _ in range(2)]

    def results(function):
        inputs = [value.clone().requires_grad_(training) for value in values]
        with torch.set_grad_enabled(training):
            found = [result for result in function(*inputs) if result is not None]
        if not training:
            return found
        total = sum((result * result).sum() for result in found if result.requires_grad)
        learned = [*inputs, *block.parameters()]
        return [*found, *torch.autograd.grad(total, learned)]

    options = {"normfuse.lowering": "inline"}
    compiled = torch.compile(block, backend="normfuse", options=options)
    torch.testing.assert_close(results(compiled), results(block))


def test_a_wider_factor_keeps_the_type_of_the_sum():
    """Out of place, the product would be float32."""

    def scaled(total, scale):
        total *= scale.float()
        return total, None

    block, inputs = Scaled(scaled).bfloat16(), [activation(2, 3) for _ in range(2)]
    y, total, _ = torch.compile(block, backend="normfuse")(*inputs)

    assert (y.dtype, total.dtype) == (torch.bfloat16, torch.bfloat16)
