"""A miss for each reason to decline: nothing is rewritten, and the report says the sentence."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing._internal.two_tensor import TwoTensor

from normfuse.explain import explain_with
from tests import blocks
from tests.blocks import WIDTH, activation

EPS = 1e-6


def declined(block, *inputs, options=None, grad=False):
    """The sentence for the one site of a block, which must stay as it was."""
    with torch.set_grad_enabled(grad):
        report = explain_with(block, inputs, options=options)
    (site,) = report.sites
    assert not site.fused
    assert "normfuse" not in report.after
    return site.reason


def inverse_rms(h):
    return torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS)


def test_mean_subtracted():
    reason = declined(blocks.CohereLayerNorm(), activation(2))
    assert reason == (
        "a mean is subtracted before the squares: this is a LayerNorm, not an RMSNorm"
    )


def test_altup_rescale():
    with torch.no_grad():
        report = explain_with(blocks.altup_rescale, (activation(2), activation(2)))
    assert [site.reason for site in report.sites] == [
        "no product of the squared value and its inverse root follows the statistic",
        "eps bounds the mean from below (clamp or maximum) instead of being added",
    ]


def test_root_scales_another_value():
    def hyper_connection(x, projected):
        return projected * inverse_rms(x)

    assert declined(hyper_connection, activation(2), activation(2)) == (
        "the inverse root multiplies another value than the one that was squared"
    )


def cosmos_norm(x):
    """As CosmosLearnablePositionalEmbed of diffusers, and as `normalize` of EDM 2."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    length = torch.add(EPS, length, alpha=(length.numel() / x.numel()) ** 0.5)
    return x / length.to(x.dtype)


@pytest.mark.parametrize(
    "norm",
    [
        lambda x: x / (x.pow(2).mean(-1, keepdim=True).sqrt() + EPS),
        lambda x: x / (x.norm(dim=-1, keepdim=True) * WIDTH**-0.5 + EPS),
        lambda x: x / (x[0, 0] * x.norm(dim=-1, keepdim=True) + EPS),
        lambda x: x * (x.float().norm(dim=-1, keepdim=True).reciprocal() + EPS),
        cosmos_norm,
    ],
)
def test_eps_beside_the_root(norm):
    assert declined(norm, activation(2)) == (
        "something is added to the root, where an eps would be added under it"
    )


@pytest.mark.parametrize(
    "norm",
    [
        lambda x: x / (x.norm(dim=-1, keepdim=True) * WIDTH**-0.5),
        lambda x: x / (x.norm(dim=-1).unsqueeze(-1) / WIDTH**0.5),
        lambda x: x * (x.norm(dim=-1, keepdim=True) * WIDTH**-0.5) ** -1,
        lambda x: x * (x.norm(dim=-1, keepdim=True) * WIDTH**-0.5).reciprocal(),
    ],
)
def test_root_is_scaled(norm):
    assert declined(norm, activation(2)) == (
        "the root is scaled before it divides: no plan has the rounding of that product"
    )


@pytest.mark.parametrize(
    "statistic",
    [
        lambda x: x.norm(dim=-1, keepdim=True).reciprocal(),
        lambda x: (x.norm(dim=-1, keepdim=True) * WIDTH**-0.5).mean(),
        lambda x: x * x.norm(dim=-1, keepdim=True).expand(2, WIDTH) + x,
    ],
)
def test_root_that_normalises_nothing(statistic):
    assert declined(statistic, activation(2, dtype=torch.float32)) == (
        "no product of the squared value and its inverse root follows the statistic"
    )


def test_root_rounded_before_it_is_inverted():
    def norm(x):
        return x * x.norm(dim=-1, keepdim=True).reciprocal()

    assert declined(norm, activation(2)) == (
        "the root is cast or reshaped before it is inverted: its roundings cannot be read"
    )


@pytest.mark.parametrize(
    "norm",
    [
        lambda x: F.normalize(x, dim=-1),
        lambda x: x / x.norm(p=2, dim=-1, keepdim=True),
        lambda x: x / torch.norm(x, dim=1, keepdim=True),
        lambda x: x / torch.linalg.vector_norm(x, dim=(-1,), keepdim=True),
        lambda x: x / torch.linalg.norm(x, dim=-1, keepdim=True),
    ],
)
def test_one_call_that_autograd_sees_whole(norm):
    x = activation(2).requires_grad_()

    assert declined(norm, x, grad=True) == (
        "the length of a vector is one call of torch here, which is taken apart only after "
        "autograd: in training it stays as it is"
    )


@pytest.mark.parametrize(
    "length",
    [
        lambda x: x.norm(),
        lambda x: x.norm(dim=0),
        lambda x: x.norm(p=1, dim=-1),
        lambda x: F.normalize(x.unsqueeze(0), dim=1),
    ],
)
def test_other_lengths_are_no_site(length):
    x = activation(2).requires_grad_()

    assert not explain_with(length, (x,)).sites


def test_square_of_a_value_that_changed():
    def norm(x):
        rstd = inverse_rms(x)
        return (x * 3) * rstd

    assert declined(norm, activation(2)) == (
        "the inverse root multiplies another value than the one that was squared"
    )


def in_place_norm(x, scale):
    h = x * 2
    variance = h.pow(2).mean(-1, keepdim=True)
    h.mul_(3)
    return h * torch.rsqrt(variance + EPS) * scale.sum()


def test_in_place_write_on_the_way_in_training():
    x, scale = activation(2, dtype=torch.float32), torch.ones(WIDTH, requires_grad=True)
    assert declined(in_place_norm, x, scale, grad=True) == (
        "a value that it reads is changed in place by `mul_` on the way"
    )


def test_in_place_write_on_the_way_in_inference():
    assert declined(in_place_norm, activation(2, dtype=torch.float32), torch.ones(WIDTH)) == (
        "the inverse root multiplies another value than the one that was squared"
    )


def test_in_place_write_to_what_the_backward_needs():
    def norm(x):
        residual = x * 2
        h = residual.float()
        residual -= (h * inverse_rms(h)).to(x.dtype)
        return residual

    assert declined(norm, activation(2).requires_grad_(), grad=True) == (
        "a value that its backward needs is changed in place by `isub` afterwards"
    )


def test_in_place_write_through_a_view():
    def norm(x, scale):
        h = x * 2
        variance = h.pow(2).mean(-1, keepdim=True)
        h[0].zero_()
        return h * torch.rsqrt(variance + EPS) * scale.sum()

    x, scale = activation(2, dtype=torch.float32), torch.ones(WIDTH, requires_grad=True)
    assert declined(norm, x, scale, grad=True) == (
        "a value that it reads is changed in place by `zero_` on the way"
    )


def test_tensor_subclass_in_a_training_graph():
    def norm(x):
        return x * inverse_rms(x)

    half = activation(2, dtype=torch.float32)
    assert declined(norm, TwoTensor(half, half * 2).requires_grad_(), grad=True) == (
        "an operand is a tensor subclass (TwoTensor), for which the op has no rule"
    )


def test_reduction_over_another_axis():
    def batch_norm(x):
        return x * torch.rsqrt(x.pow(2).mean(0, keepdim=True) + EPS)

    assert declined(batch_norm, activation(2)) == (
        "the squares are reduced over dimensions [0] of 2, not over the last one alone"
    )


def test_reduction_over_two_axes():
    def norm(x):
        return x * torch.rsqrt(x.pow(2).mean((-2, -1), keepdim=True) + EPS)

    assert declined(norm, activation(3, 2)) == (
        "the squares are reduced over dimensions [1, 2] of 3, not over the last one alone"
    )


def test_mean_without_its_axis():
    def norm(x):
        return x * torch.rsqrt(x.pow(2).mean(-1) + EPS)

    assert declined(norm, activation(WIDTH)) == (
        "the inverse root of shape (8,) multiplies (8, 8): that is not one number per row"
    )


def test_inverse_root_expanded_over_the_wrong_axis():
    def norm(x):
        return x * torch.rsqrt(x.pow(2).mean(-1) + EPS).expand(WIDTH, WIDTH)

    assert declined(norm, activation(WIDTH)) == (
        "no product of the squared value and its inverse root follows the statistic"
    )


def test_mean_with_its_axis_in_front():
    def norm(x):
        return x * torch.rsqrt(x.pow(2).mean(-1).unsqueeze(0) + EPS)

    assert declined(norm, activation(WIDTH)) == (
        "the mean of the squares of (8, 8) has shape (1, 8) on its way: "
        "that is not one number per row"
    )


def test_squares_reshaped_before_their_mean():
    def norm_of_half_rows(x):
        variance = x.pow(2).view(4, 4).mean(-1).view(2, 2, 1).expand(2, 2, 4)
        return x * torch.rsqrt(variance + EPS).reshape(2, WIDTH)

    assert declined(norm_of_half_rows, activation(2)) == (
        "the squares of (2, 8) are summed as (4, 4): they are reshaped before their mean"
    )


def test_functional_norm_over_two_axes():
    def norm(x):
        return F.rms_norm(x, (2, WIDTH))

    x = activation(3, 2).requires_grad_()
    assert declined(norm, x, grad=True) == "the norm does not run over the last dimension alone"


def test_wrong_divisor():
    def norm(x):
        h = x.float()
        return h * torch.rsqrt(h.pow(2).sum(-1, keepdim=True) / (WIDTH - 1) + EPS)

    assert declined(norm, activation(2)) == (
        "the sum of the squares is not divided by the width of the last axis, 8"
    )


def test_statistic_that_changes_type():
    def norm(x):
        variance = x.pow(2).mean(-1, keepdim=True).float()
        return x * torch.rsqrt(variance + EPS)

    assert declined(norm, activation(2)) == (
        "the statistic changes type on its way, from torch.bfloat16 to torch.float32: "
        "its roundings cannot be read exactly"
    )


def test_inverse_root_rounded_twice():
    def norm(x):
        h = x.double()
        return h * inverse_rms(h).float().bfloat16()

    assert declined(norm, activation(2)) == (
        "the inverse root is rounded twice before it multiplies"
    )


def test_variance_with_another_user():
    def norm(x):
        variance = x.pow(2).mean(-1, keepdim=True)
        return x * torch.rsqrt(variance + EPS), variance

    assert declined(norm, activation(2)) == (
        "an intermediate of the statistic has another user, which no op returns"
    )


def test_square_root_with_another_user():
    def norm(x):
        root = torch.sqrt(x.pow(2).mean(-1, keepdim=True) + EPS)
        return x / root, root

    assert declined(norm, activation(2)) == (
        "the square root of the variance has another user, which no op returns"
    )


def test_weight_of_the_wrong_axis():
    def norm(x, weight):
        return x * inverse_rms(x) * weight

    assert declined(norm, activation(3), torch.rand(3, 1)) == (
        "the weight of shape (3, 1) is no row vector over the last axis, 8"
    )


def test_eps_that_is_no_number():
    def norm(x, eps):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)

    assert declined(norm, activation(3), torch.rand(3, 1).bfloat16()) == (
        "what is added to the mean of the squares is not one number, so it is no eps"
    )


def test_something_between_mean_and_root():
    def norm(x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) * 2 + EPS)

    assert declined(norm, activation(3)) == (
        "more than an eps stands between the mean of the squares and its root"
    )


def test_symbolic_width():
    def norm(x):
        return x * inverse_rms(x)

    x = activation(3)
    torch._dynamo.mark_dynamic(x, 1)
    assert declined(norm, x) == (
        "the width of the normalised axis is symbolic: mark that dimension static"
    )


def test_type_without_a_kernel():
    def norm(x):
        return x * inverse_rms(x)

    assert declined(norm, torch.randn(2, WIDTH, dtype=torch.complex64)) == (
        "the statistic is computed in torch.complex64, which no kernel has"
    )


@pytest.mark.parametrize("glob", ["norm", "no*"])
def test_module_that_the_user_skips(glob):
    reason = declined(
        blocks.FunctionalNorm().bfloat16(), activation(2), options={"normfuse.skip": [glob]}
    )
    assert reason == f"the option normfuse.skip names this module ({glob})"
