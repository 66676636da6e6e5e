"""The blocks that the tests rewrite, spelled as in transformers 5.17.0, at tiny sizes."""

import torch
from torch import nn

WIDTH = 8


class LlamaRMSNorm(nn.Module):
    """`LlamaRMSNorm`: rounds to the input's type before the weight."""

    def __init__(self, width=WIDTH, eps=1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width) + 0.5)
        self.variance_epsilon = eps

    def forward(self, hidden_states):
        input_dtype = hidden_states.dtype
        hidden_states = hidden_states.to(torch.float32)
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
        return self.weight * hidden_states.to(input_dtype)


class GemmaRMSNorm(nn.Module):
    """`Gemma3RMSNorm`: one rounding, after `1 + weight`; the weight is stored around zero."""

    def __init__(self, width=WIDTH, eps=1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width) - 0.5)
        self.eps = eps

    def _norm(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)

    def forward(self, x):
        output = self._norm(x.float())
        output = output * (1.0 + self.weight.float())
        return output.type_as(x)


class Olmo2RMSNorm(nn.Module):
    """`Olmo2RMSNorm`: the weight multiplies in float32, then one rounding."""

    def __init__(self, width=WIDTH, eps=1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width) + 0.5)
        self.variance_epsilon = eps

    def forward(self, hidden_states):
        input_dtype = hidden_states.dtype
        hidden_states = hidden_states.to(torch.float32)
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
        return (self.weight * hidden_states).to(input_dtype)


class Gemma4WeightlessNorm(nn.Module):
    """`Gemma4RMSNorm(with_scale=False)`: `pow(-0.5)`, no weight."""

    def __init__(self, eps=1e-6):
        super().__init__()
        self.eps = eps

    def forward(self, hidden_states):
        float_states = hidden_states.float()
        mean_squared = float_states.pow(2).mean(-1, keepdim=True) + self.eps
        return (float_states * torch.pow(mean_squared, -0.5)).type_as(hidden_states)


class Gemma4RMSNorm(Gemma4WeightlessNorm):
    """`Gemma4RMSNorm`: `pow(-0.5)`, and one rounding after the weight."""

    def __init__(self, width=WIDTH, eps=1e-6):
        super().__init__(eps)
        self.weight = nn.Parameter(torch.rand(width) + 0.5)

    def forward(self, hidden_states):
        normed_output = super().forward(hidden_states.float())
        return (normed_output * self.weight.float()).type_as(hidden_states)


class LlamaBlock(nn.Module):
    """The second half of `LlamaDecoderLayer`: add, norm, branch, add."""

    def __init__(self):
        super().__init__()
        self.norm = LlamaRMSNorm()
        self.branch = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, hidden_states, residual):
        hidden_states = residual + hidden_states
        residual = hidden_states
        hidden_states = self.norm(hidden_states)
        hidden_states = self.branch(hidden_states)
        return residual + hidden_states


class GemmaBlock(nn.Module):
    """`Gemma3DecoderLayer`'s sandwich: norm, add, norm, branch."""

    def __init__(self):
        super().__init__()
        self.post_attention_layernorm = GemmaRMSNorm()
        self.pre_feedforward_layernorm = GemmaRMSNorm()
        self.post_feedforward_layernorm = GemmaRMSNorm()
        self.mlp = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, hidden_states, residual):
        hidden_states = self.post_attention_layernorm(hidden_states)
        hidden_states = residual + hidden_states
        residual = hidden_states
        hidden_states = self.pre_feedforward_layernorm(hidden_states)
        hidden_states = self.mlp(hidden_states)
        hidden_states = self.post_feedforward_layernorm(hidden_states)
        return residual + hidden_states


class BranchBetweenNorms(nn.Module):
    """A layer of Gemma 3, its attention or MLP being one product."""

    def __init__(self, width):
        super().__init__()
        self.before, self.after = GemmaRMSNorm(width), GemmaRMSNorm(width)
        self.linear = nn.Linear(width, width, bias=False)

    def forward(self, x):
        return x + self.after(self.linear(self.before(x)))


class Gemma4Block(nn.Module):
    """`Gemma4TextDecoderLayer`: the sum is scaled in place, then the next layer normalises it."""

    def __init__(self):
        super().__init__()
        self.post_feedforward_layernorm = GemmaRMSNorm()
        self.register_buffer("layer_scalar", torch.full((1,), 0.7))
        self.input_layernorm = GemmaRMSNorm()

    def forward(self, hidden_states, residual):
        hidden_states = self.post_feedforward_layernorm(hidden_states)
        hidden_states = residual + hidden_states
        hidden_states *= self.layer_scalar
        return self.input_layernorm(hidden_states), hidden_states


class Gemma4ExpertNorms(nn.Module):
    """`Gemma4TextDecoderLayer` with experts, its middle: three norms read the residual."""

    def __init__(self):
        super().__init__()
        self.post_attention_layernorm = Gemma4RMSNorm()
        self.pre_feedforward_layernorm = Gemma4RMSNorm()
        self.router_norm = Gemma4WeightlessNorm()
        self.scale = nn.Parameter(torch.rand(WIDTH) + 0.5)
        self.scalar_root_size = WIDTH**-0.5
        self.pre_feedforward_layernorm_2 = Gemma4RMSNorm()

    def forward(self, hidden_states, residual):
        hidden_states = self.post_attention_layernorm(hidden_states)
        hidden_states = residual + hidden_states
        residual = hidden_states
        hidden_states = self.pre_feedforward_layernorm(hidden_states)
        hidden_states_flat = residual.reshape(-1, residual.shape[-1])
        router = self.router_norm(hidden_states_flat) * self.scale * self.scalar_root_size
        hidden_states_2 = self.pre_feedforward_layernorm_2(hidden_states_flat)
        return hidden_states, router, hidden_states_2, residual


class Gemma4ExpertsBlock(nn.Module):
    """`Gemma4TextDecoderLayer` with experts, its end, and the norm that begins the next layer."""

    def __init__(self):
        super().__init__()
        self.post_feedforward_layernorm_1 = Gemma4RMSNorm()
        self.post_feedforward_layernorm_2 = Gemma4RMSNorm()
        self.post_feedforward_layernorm = Gemma4RMSNorm()
        self.register_buffer("layer_scalar", torch.full((1,), 0.7))
        self.input_layernorm = Gemma4RMSNorm()

    def forward(self, hidden_states, hidden_states_2, residual):
        hidden_states_1 = self.post_feedforward_layernorm_1(hidden_states)
        hidden_states_2 = self.post_feedforward_layernorm_2(hidden_states_2)
        hidden_states = hidden_states_1 + hidden_states_2
        hidden_states = self.post_feedforward_layernorm(hidden_states)
        hidden_states = residual + hidden_states
        hidden_states *= self.layer_scalar
        return self.input_layernorm(hidden_states), hidden_states


class SumOfTwoNorms(nn.Module):
    """A plain sum that two norms read, before two branches."""

    def __init__(self):
        super().__init__()
        self.attention_norm = LlamaRMSNorm()
        self.mlp_norm = LlamaRMSNorm()

    def forward(self, hidden_states, residual):
        hidden_states = residual + hidden_states
        return self.attention_norm(hidden_states), self.mlp_norm(hidden_states), hidden_states


class GraniteBlock(nn.Module):
    """`GraniteDecoderLayer`: the branch is scaled by a number before the add."""

    def __init__(self):
        super().__init__()
        self.norm = LlamaRMSNorm()
        self.residual_multiplier = 0.22

    def forward(self, hidden_states, residual):
        hidden_states = residual + hidden_states * self.residual_multiplier
        return self.norm(hidden_states), hidden_states


class OlmoBlock(nn.Module):
    """`Olmo2DecoderLayer`: the norm follows the branch, the sum goes straight into the next one."""

    def __init__(self):
        super().__init__()
        self.post_attention_layernorm = Olmo2RMSNorm()
        self.mlp = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, hidden_states, residual):
        hidden_states = self.post_attention_layernorm(hidden_states)
        hidden_states = residual + hidden_states
        return self.mlp(hidden_states)


class HyperClovaBlock(nn.Module):
    """A norm that is scaled by a number before the add."""

    def __init__(self):
        super().__init__()
        self.norm = LlamaRMSNorm()

    def forward(self, hidden_states, residual):
        return residual + self.norm(hidden_states) * 0.5


class FunctionalNorm(nn.Module):
    """`torch.nn.RMSNorm`, which calls `F.rms_norm`."""

    def __init__(self):
        super().__init__()
        self.norm = nn.RMSNorm(WIDTH, eps=1e-6)

    def forward(self, x):
        return self.norm(x)


class SharedWeight(nn.Module):
    """One weight, two norms."""

    def __init__(self):
        super().__init__()
        self.norm = LlamaRMSNorm()

    def forward(self, x, y):
        return self.norm(x), self.norm(y)


class ThreeUsers(nn.Module):
    """A sum that is normalised, added to and returned."""

    def __init__(self):
        super().__init__()
        self.norm = LlamaRMSNorm()

    def forward(self, hidden_states, residual):
        hidden_states = residual + hidden_states
        return self.norm(hidden_states), hidden_states * hidden_states, hidden_states


class CohereLayerNorm(nn.Module):
    """`CohereLayerNorm`: a mean is subtracted, so it is no RMSNorm in spite of its looks."""

    def __init__(self, width=WIDTH, eps=1e-5):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.variance_epsilon = eps

    def forward(self, hidden_states):
        input_dtype = hidden_states.dtype
        hidden_states = hidden_states.to(torch.float32)
        mean = hidden_states.mean(-1, keepdim=True)
        variance = (hidden_states - mean).pow(2).mean(-1, keepdim=True)
        hidden_states = (hidden_states - mean) * torch.rsqrt(variance + self.variance_epsilon)
        hidden_states = self.weight.to(torch.float32) * hidden_states
        return hidden_states.to(input_dtype)


def altup_rescale(target, x):
    """`Gemma3nTextModel.forward`: x is scaled to the magnitude of target."""
    target_magnitude = torch.mean(target**2, dim=-1, keepdim=True) ** 0.5
    new_magnitude = torch.mean(x**2, dim=-1, keepdim=True)
    new_magnitude = torch.sqrt(torch.maximum(new_magnitude, torch.tensor(1e-5)))
    return x * target_magnitude / new_magnitude


def activation(*shape, dtype=torch.bfloat16):
    """Random activations of a size at which roundings differ."""
    return torch.randn(*shape, WIDTH).to(dtype)
