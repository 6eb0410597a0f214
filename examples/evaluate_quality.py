"""Evaluate a quantized diffusion model: against full precision image by image, and as a set against real images.

    python examples/evaluate_quality.py [MODEL IMAGES FEATURES]

IMAGES: a folder of pictures of the model's size, or an .npz. FEATURES: Inception-v3 weights (the distance is then FID),
or a classifier's folder. Without arguments: the included model, and images of other seeds instead of real ones.
`modiff evaluate` does the same with more metrics and a report, and continues after a stop.
"""

import sys
from pathlib import Path

import numpy as np
import torch

import modiff
from modiff.evaluate.features.load import load_extractor, result_name
from modiff.evaluate.metrics.frechet import frechet_interval
from modiff.evaluate.metrics.paired import paired_errors
from modiff.evaluate.suite.images import read_reference
from modiff.hosts.diffusers.load import load_pipeline

COUNT, BATCH, STEPS = 24, 8, 8  # for figures that you publish: thousands of images, and the steps that you will use
MODEL, IMAGES, FEATURES = sys.argv[1:] or ("embedded", None, "classifier")
pipe = load_pipeline(MODEL)


def draw(steps=STEPS, seed=0):
    """Image i comes from the noise of seed + i, in full precision and quantized alike: uint8 (COUNT, H, W, C)."""
    batches = []
    for first in range(seed, seed + COUNT, BATCH):
        noise = [torch.Generator().manual_seed(i) for i in range(first, first + BATCH)]
        batches.append(pipe(batch_size=BATCH, num_inference_steps=steps, generator=noise, output_type="np").images)
    return torch.from_numpy(np.concatenate(batches) * 255).round().byte()


def text(interval):
    return f"{interval['estimate']:.4g} [{interval['low']:.4g}, {interval['high']:.4g}]"


exact = draw()
real = torch.from_numpy(np.concatenate([*read_reference(Path(IMAGES))])) if IMAGES else draw(seed=10_000)
rows = {"full precision": exact, "half the steps": draw(STEPS // 2)}
modiff.apply(pipe, "w8a4")
rows["W8A4"] = draw()

features = load_extractor(FEATURES)
distance = result_name("fd", features)
for name, images in rows.items():
    print(name)
    if images is not exact:
        errors, pooled = paired_errors(images, exact), features(images).pooled
        print(f"  relative L2 {text(errors['relative_l2'])}, PSNR {text(errors['psnr_db'])} dB")
        paired = frechet_interval(pooled, features(exact).pooled, draw="paired", resamples=100)
        print(f"  {distance} to full precision, same seeds: {text(paired)}")
    print(f"  {distance} to real images: {text(frechet_interval(features(images).pooled, features(real).pooled))}")
