"""Quantize a score network that is no diffusers model: points, an Euler sampler, `sigma` as the time argument.

python examples/score_network.py
"""

from itertools import pairwise

import torch
from torch import nn

import modiff


class ScoreNet(nn.Module):
    """Points (rows, 2) and noise levels to a dictionary with the denoised points; yours is trained."""

    def __init__(self, width=128):
        super().__init__()
        self.first = nn.Linear(3, width)
        self.middle = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.last = nn.Linear(width, 2)

    def forward(self, x, sigma):
        h = torch.cat([x, sigma.log().expand(len(x), 1)], 1)
        return {"denoised": self.last(self.middle(torch.nn.functional.silu(self.first(h))))}


@torch.no_grad()
def sample(net, noise, steps=20):
    sigmas = torch.cat([torch.logspace(1, -2, steps), torch.zeros(1)])
    x = noise * sigmas[0]
    for sigma, following in pairwise(sigmas):
        denoised = net(x / (1 + sigma**2).sqrt(), sigma)["denoised"]
        x = x + (following - sigma) * (x - denoised) / sigma
    return x


torch.manual_seed(0)
net, noise = ScoreNet().eval(), torch.randn(64, 2)
exact = sample(net, noise)
print(modiff.apply(net, modiff.ModiffConfig(exclude=("first", "last"))))  # ends of a network keep their floats
with modiff.trajectory(net):
    quantized = sample(net, noise)
print(f"relative L2: {(quantized - exact).norm() / exact.norm():.4f}")
