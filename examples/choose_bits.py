"""How many bits does my diffusion model need? The error of a few configurations from the same noise.

python examples/choose_bits.py [MODEL]
"""

import sys

import torch
from diffusers import DiffusionPipeline

import modiff
from modiff.assets import embedded_folder

pipe = DiffusionPipeline.from_pretrained(sys.argv[1] if len(sys.argv) > 1 else embedded_folder())
pipe.set_progress_bar_config(disable=True)


def sample():
    noise = torch.Generator().manual_seed(0)
    return torch.from_numpy(pipe(num_inference_steps=6, generator=noise, output_type="np").images)


exact = sample()
for config in ("w8a8", "plain:8:8", "w8a4", "plain:8:4", "w4a8"):
    modiff.apply(pipe, config)  # names without "plain" quantize changes between steps
    print(f"{config:>9}: relative L2 {(sample() - exact).norm() / exact.norm():.4f}")
    modiff.remove(pipe)  # the same modules and bits as before
