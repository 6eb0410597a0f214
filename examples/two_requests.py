"""Serve several requests at once from threads with one quantized diffusion model.

python examples/two_requests.py [MODEL]
"""

import sys
from concurrent.futures import ThreadPoolExecutor

import torch
from diffusers import DiffusionPipeline

import modiff
from modiff.assets import embedded_folder

pipe = DiffusionPipeline.from_pretrained(sys.argv[1] if len(sys.argv) > 1 else embedded_folder())
pipe.set_progress_bar_config(disable=True)
modiff.apply(pipe, "w8a8")


def serve(own, seed):
    return own(num_inference_steps=5, generator=torch.Generator().manual_seed(seed), output_type="np").images


copies = [modiff.clone(pipe) for _ in range(2)]  # same weights, states and schedulers of their own
for copy in copies:
    copy.set_progress_bar_config(disable=True)
with ThreadPoolExecutor(2) as pool:
    together = list(pool.map(serve, copies, (0, 1)))
alone = [serve(pipe, seed) for seed in (0, 1)]
difference = max(abs(a - b).max() for a, b in zip(together, alone, strict=True))
print(f"two requests at once: largest difference to one after the other {difference:.2g}")
