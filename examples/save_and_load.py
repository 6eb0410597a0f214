"""Save a quantized diffusion model as 4-bit weights, and load it again.

python examples/save_and_load.py [MODEL]
"""

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from diffusers import DiffusionPipeline

import modiff
from modiff.assets import embedded_folder


def sample(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe(num_inference_steps=5, generator=torch.Generator().manual_seed(0), output_type="np").images


pipe = DiffusionPipeline.from_pretrained(sys.argv[1] if len(sys.argv) > 1 else embedded_folder())
exact = sample(pipe)
floats = sum(parameter.nbytes for parameter in pipe.unet.parameters())
modiff.apply(pipe, "w4a8")
with TemporaryDirectory() as folder:
    modiff.save(pipe, Path(folder, "w4a8"), anchor_weights="int8")  # safetensors and JSON, read by from_pretrained too
    size = sum(file.stat().st_size for file in Path(folder, "w4a8", "unet").glob("*.safetensors"))
    loaded = sample(modiff.load(Path(folder, "w4a8")))
error = ((loaded - exact) ** 2).sum() ** 0.5 / (exact**2).sum() ** 0.5
print(f"weights: {floats / 2**20:.1f} MiB before, {size / 2**20:.1f} MiB on disk; relative L2 {error:.4f}")
