"""Quantize a diffusion model in a sampling loop of my own, without a pipeline.

python examples/own_sampler.py [MODEL]
"""

import sys

import torch
from diffusers import DDIMScheduler, UNet2DModel

import modiff
from modiff.assets import embedded_folder

model = sys.argv[1] if len(sys.argv) > 1 else embedded_folder()
unet = UNet2DModel.from_pretrained(model, subfolder="unet").eval()
scheduler = DDIMScheduler.from_pretrained(model, subfolder="scheduler")
size = unet.config.sample_size
noise = torch.randn(1, unet.config.in_channels, size, size, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def sample(steps=10):
    x = noise
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        x = scheduler.step(unet(x, t).sample, t, x).prev_sample
    return x


exact = sample()
modiff.apply(unet, "w8a4")
with modiff.trajectory(unet):  # around one generation, first step to last
    quantized = sample()
print(f"W8A4 in a loop of its own: relative L2 {(quantized - exact).norm() / exact.norm():.4f}")
print(modiff.report(unet).memory)
