"""A block of your own: what becomes of its norms? Runs in seconds, without a GPU."""

import torch
from torch import nn

import normfuse


class Block(nn.Module):
    def __init__(self, width=64):
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.RMSNorm(width), nn.RMSNorm(width)
        self.attention, self.mlp = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x):
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


def make():
    """For the shell: python -m normfuse explain examples/explain_one_block.py:make"""
    return Block().eval(), (torch.randn(8, 64),)


if __name__ == "__main__":
    block, inputs = make()
    with torch.no_grad():
        print(normfuse.explain(block, *inputs))
