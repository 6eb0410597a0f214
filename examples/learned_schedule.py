"""Sample the embedded model with a schedule that follows the noise that is really there, and as a DDM.

    python examples/learned_schedule.py

Prints the level that a small network reads of the samples after each of six steps, next to that of the fixed schedule,
in full precision and modulated, and writes the images to learned_schedule.png.
"""

import numpy as np
import torch
from diffusers import DDIMPipeline
from PIL import Image

import modiff
from modiff.assets import embedded_folder, noise_level_folder
from modiff.generate.samplers import UnconditionalPipeline
from modiff.sampling.ddm import DDMScheduler
from modiff.sampling.noise_level import LearnedSchedulePipeline, NoiseLevelEstimator

STEPS, IMAGES = 6, 4


def main() -> None:
    """A row of images for each way to sample."""
    base = DDIMPipeline.from_pretrained(embedded_folder())
    estimator = NoiseLevelEstimator.from_pretrained(noise_level_folder())
    learned = LearnedSchedulePipeline(base.unet, base.scheduler, estimator)
    as_ddm = UnconditionalPipeline(unet=base.unet, scheduler=DDMScheduler.from_config(base.scheduler.config))
    for pipe in (learned, as_ddm):
        pipe.set_progress_bar_config(disable=True)

    def draw(pipe, **options):
        noise = torch.Generator().manual_seed(0)
        return pipe(IMAGES, noise, num_inference_steps=STEPS, output_type="np", **options)

    fixed, adjusted = draw(learned, adjusted_steps=()), draw(learned)
    modiff.apply(learned, "w8a8")
    modulated = draw(learned)
    modiff.remove(learned)
    print("level ab before each step")
    for name, output in (("fixed", fixed), ("adjusted", adjusted), ("adjusted, W8A8", modulated)):
        print(f"{name:>15}", *(f"{level:.4f}" for level in output.levels))
    rows = [fixed.images, adjusted.images, modulated.images, draw(as_ddm).images]
    grid = np.concatenate([np.concatenate([*row], 1) for row in rows])
    Image.fromarray((grid[..., 0] * 255).round().astype(np.uint8)).save("learned_schedule.png")


if __name__ == "__main__":
    main()
