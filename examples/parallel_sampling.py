"""Sample many steps in one batch (ParaDiGMS), in full precision and modulated along the window.

python examples/parallel_sampling.py
"""

import numpy as np
import torch
from diffusers import DDIMScheduler

import modiff
from modiff.hosts.diffusers.load import load_pipeline
from modiff.sampling.pipelines import ParallelPipeline

STEPS, IMAGES = 20, 2
pipe = load_pipeline("embedded")
fast = ParallelPipeline(unet=pipe.unet, scheduler=DDIMScheduler.from_config(pipe.scheduler.config))
fast.set_progress_bar_config(disable=True)


def sample(**settings):
    noise = torch.Generator().manual_seed(0)
    return fast(IMAGES, generator=noise, num_inference_steps=STEPS, output_type="np", **settings)


def error(images):
    return np.linalg.norm(images - exact.images) / np.linalg.norm(exact.images)


exact = sample(parallel=1, tolerance=0)
print(f"one after the other: {exact.iterations} iterations")
for tolerance in (0.1, 0.02):
    result = sample(parallel=10, tolerance=tolerance)
    print(f"tolerance {tolerance}: {result.iterations} iterations, {result.evaluations} evaluations, "
          f"relative L2 {error(result.images):.4f}")  # fmt: skip

# The rows of one call are neighbours, as steps are: modulated layers code each row's residual to the row before.
modiff.apply(fast, "w8a4")
result = sample(parallel=10, tolerance=0.02)
print(f"tolerance 0.02, W8A4 along the window: {result.iterations} iterations, relative L2 {error(result.images):.4f}")
