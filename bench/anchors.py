"""What does the weight that meets the input where the states start do to the error, on the embedded model?

python bench/anchors.py --json docs/results/anchors.json

DDIM, weights rounded to nearest, nothing calibrated: relative L2 of the final images to full precision from the same
noise. The integers are those of the paper's form in every row; only anchors differ.

python bench/anchors.py --samplers all --num-images 16 --json docs/results/samplers.json

Is modulated ever worse than plain? Samplers with and without noise, dynamic and static scales (measured on the same
sampler), on integers: relative L2 of both, and the geometric mean of the ratios of single images with its 95 %
interval. Run again, it goes on where it was stopped.
"""

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

import modiff
from modiff import LayerConfig, ModiffConfig, ModulationConfig, QuantizerConfig, WeightConfig, presets
from modiff.config import PackedAnchors
from modiff.evaluate.metrics.paired import relative_l2
from modiff.files import check_writable, write_json
from modiff.generate.environment import environment
from modiff.generate.samplers import set_scheduler
from modiff.hosts.diffusers.load import load_pipeline
from modiff.hosts.diffusers.runs import noise_generators

BITS = {"W8A8": (8, 8), "W8A4": (8, 4), "W4A8": (4, 8)}
ANCHORS: dict[str, tuple[dict[str, Any], PackedAnchors | None]] = {
    "quantized (paper)": ({"anchor_weights": "quantized"}, None),
    "exact": ({}, None),
    "int8 codes": ({}, "int8"),
    "exact, every 25 steps": ({"reanchor_every": 25}, None),
    "exact, every 10 steps": ({"reanchor_every": 10}, None),
    "exact, every 5 steps": ({"reanchor_every": 5}, None),
    "exact, every 10 steps, all at once": ({"reanchor_every": 10, "stagger": False}, None),
    "int8 codes, every 10 steps": ({"reanchor_every": 10}, "int8"),
    "int8 codes, every 10 steps, all at once": ({"reanchor_every": 10, "stagger": False}, "int8"),
}
"""Settings of the loop, and what `modiff.pack` keeps; None leaves the floats."""
QUICK = ("quantized (paper)", "exact", "int8 codes")
SAMPLERS: dict[str, tuple[str, int]] = {
    **{f"ddim{n}": ("DDIMScheduler", n) for n in (10, 20, 50)},
    **{f"ddpm{n}": ("DDPMScheduler", n) for n in (10, 50)},
    **{f"lcm{n}": ("LCMScheduler", n) for n in (4, 8)},
    "ancestral6": ("EulerAncestralDiscreteScheduler", 6),
    "consistency8": ("CMStochasticIterativeScheduler", 8),
}
"""Scheduler and steps. That of consistency models has noise levels of its own, 20 to .002."""


def config_of(bits: tuple[int, int], loop: dict[str, Any]) -> ModiffConfig:
    """The modulated preset with another loop."""
    config = presets.modulated(*bits)
    modulation = dataclasses.replace(config.layer.modulation or modiff.ModulationConfig(), **loop)
    return dataclasses.replace(config, layer=dataclasses.replace(config.layer, modulation=modulation))


def sampled(network: nn.Module, training: dict[str, Any], name: str, count: int, seed: int) -> Tensor:
    """Final images of one of SAMPLERS, from the same noise for each network."""
    (kind, steps), consistency = SAMPLERS[name], name.startswith("consistency")
    names = ("beta_start", "beta_end", "beta_schedule", "prediction_type")
    betas: dict[str, Any] = {key: training[key] for key in names}
    settings = {"num_train_timesteps": 40, "sigma_max": 20.0} if consistency else betas
    settings = settings | ({"clip_sample": False} if name.startswith("dd") else {})
    scheduler, noise = getattr(diffusers, kind)(**settings), torch.Generator().manual_seed(seed)
    scheduler.set_timesteps(steps)
    timesteps = scheduler.timesteps
    if consistency:  # the network's own timestep at each noise level
        kept = diffusers.DDPMScheduler(**betas).alphas_cumprod
        timesteps = torch.searchsorted((1 / kept - 1).sqrt(), scheduler.sigmas[:steps])
    x = torch.randn(count, 1, 32, 32, generator=noise) * scheduler.init_noise_sigma
    with torch.no_grad():
        for t, timestep in zip(scheduler.timesteps, timesteps, strict=True):
            step = scheduler.step(network(scheduler.scale_model_input(x, t), timestep).sample, t, x, generator=noise)
            x = step.prev_sample
    return getattr(step, "denoised", x) if name.startswith("lcm") else x


def compared(pipe: Any, row: dict[str, Any], exact: Tensor, count: int, seed: int) -> dict[str, Any]:
    """The row with the relative L2 of each image, plain and modulated."""
    network, (weights, activations) = pipe.unet, (int(bits) for bits in row["bits"][1:].split("A"))
    for how, modulation in (("plain", None), ("modulated", ModulationConfig())):

        def draw() -> Tensor:
            with modiff.trajectory(network):
                return sampled(network, dict(pipe.scheduler.config), row["sampler"], count, seed)

        activation = QuantizerConfig(bits=activations, dynamic=row["scales"] == "dynamic")
        layer = LayerConfig(weight=WeightConfig(bits=weights), activation=activation, modulation=modulation)
        modiff.apply(network, ModiffConfig(layer=layer).on_integers())
        if not activation.dynamic:
            modiff.calibrate(network, draw)
        row[how] = [relative_l2(image, reference) for image, reference in zip(draw(), exact, strict=True)]
        modiff.remove(network)
    return row


def compare(options: argparse.Namespace) -> None:
    """A row for each sampler, pair of bit widths and kind of scales."""
    names = list(SAMPLERS) if options.samplers == "all" else options.samplers.split(",")
    pipe: Any = load_pipeline(options.model)
    settings = {key: getattr(options, key) for key in ("model", "num_images", "seed")}
    stored = json.loads(options.json.read_text()) if options.json is not None and options.json.exists() else {}
    rows: list[dict[str, Any]] = stored["rows"] if stored.get("settings") == settings else []
    known = {(row["sampler"], row["bits"], row["scales"]) for row in rows}
    new = [(n, bits, scales) for scales in ("static", "dynamic") for n in names for bits in (*BITS, "W4A4")]
    exact: dict[str, Tensor] = {}
    for name, bits, scales in tqdm([key for key in new if key not in known]):
        if name not in exact:
            exact[name] = sampled(pipe.unet, dict(pipe.scheduler.config), name, options.num_images, options.seed)
        row = {"sampler": name, "bits": bits, "scales": scales}
        rows.append(compared(pipe, row, exact[name], options.num_images, options.seed))
        if options.json is not None:
            write_json(options.json, {"rows": rows, "settings": settings, "environment": dict(environment())})
    print("| sampler | bits | scales | plain | modulated | ratio |\n|---|---|---|--:|--:|---|")
    for row in rows:
        ratios = np.log(np.divide(row["modulated"], row["plain"]))
        ratio, half = np.exp(ratios.mean()), 1.96 * ratios.std(ddof=1) / len(ratios) ** 0.5
        cells = [
            row["sampler"],
            row["bits"],
            row["scales"],
            *(f"{np.mean(row[h]):.4f}" for h in ("plain", "modulated")),
        ]
        print(f"| {' | '.join(cells)} | {ratio:.2f} ± {ratio * half:.2f} |")


def main(argv: Sequence[str] | None = None) -> None:
    """A row for each way to anchor, a column for each pair of bit widths; or see `compare`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--num-images", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="the first three rows alone")
    parser.add_argument("--samplers", help=f"compare with plain instead: all, or some of {','.join(SAMPLERS)}")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(argv)
    if options.json is not None:
        check_writable(options.json)
    if options.samplers is not None:
        return compare(options)

    def images(config: ModiffConfig | None, packing: PackedAnchors | None = None) -> np.ndarray:
        pipe: Any = set_scheduler(load_pipeline(options.model), "ddim")
        if config is not None:
            modiff.apply(pipe, config)
        if packing is not None:
            modiff.pack(pipe, anchor_weights=packing)
        noise = noise_generators(options.seed, range(options.num_images))
        arguments = {"num_inference_steps": options.steps, "generator": noise, "output_type": "np"}
        return pipe(batch_size=options.num_images, **arguments).images

    reference = images(None)
    names = QUICK if options.quick else tuple(ANCHORS)
    rows: list[dict[str, Any]] = [{"anchor": name} for name in names]
    for row, (bits, widths) in tqdm([(row, item) for row in rows for item in BITS.items()]):
        loop, packing = ANCHORS[row["anchor"]]
        row[bits] = relative_l2(images(config_of(widths, loop), packing), reference)
    print(f"| anchored with | {' | '.join(BITS)} |\n|---|{'---|' * len(BITS)}")
    for row in rows:
        print(f"| {row['anchor']} | {' | '.join(f'{row[bits]:.4f}' for bits in BITS)} |")
    if options.json is not None:
        settings = {key: getattr(options, key) for key in ("model", "steps", "num_images", "seed")}
        write_json(options.json, {"rows": rows, "settings": settings, "environment": dict(environment())})


if __name__ == "__main__":
    main()
