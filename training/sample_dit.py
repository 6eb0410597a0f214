"""Draw images of every class with a transformer of train_dit.py, and see what coding its activations changes.

    python training/sample_dit.py --run runs/dit --config w8a4 -o dit.png

Prints the relative L2 to full precision on the same noise; the picture has a row for each class, coded by --config.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler
from make_assets import draw_grid
from torch import Tensor
from train_dit import PART

import modiff
from modiff.errors import ModiffError
from modiff.evaluate.metrics.paired import relative_l2
from modiff.hosts.diffusers.load import load_model
from modiff.hosts.diffusers.runs import noise_generators
from modiff.presets import as_config


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="output folder of train_dit.py")
    parser.add_argument("-o", "--output", type=Path, required=True, help="the picture, .png")
    parser.add_argument("--config", help="a preset or a .json file of modiff; default: full precision only")
    parser.add_argument("--steps", type=int, default=50, help="DDIM steps")
    parser.add_argument("--guidance", type=float, default=2.0, help="1 leaves the evaluations without a class out")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


@torch.no_grad()
def draw(net: Any, scheduler: DDIMScheduler, labels: Tensor, *, steps: int, guidance: float, seed: int) -> Tensor:
    """(N, C, H, W) in [0, 1] on the CPU, row i from the noise of seed + i: eps = eps_none + g (eps_class - eps_none).

    Both evaluations of a step go in one batch, so one trajectory of modiff serves both.
    """
    config = net.config
    shape = (config.in_channels, config.sample_size, config.sample_size)
    x = torch.stack([torch.randn(shape, generator=g) for g in noise_generators(seed, range(len(labels)))])
    classes, x = labels.to(net.device), x.to(net.device)
    guided = guidance != 1
    if guided:
        classes = torch.cat([classes, torch.full_like(classes, config.num_embeds_ada_norm)])
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        both = torch.cat([x, x]) if guided else x
        noise = net(both, t.to(x.device).expand(len(both)), class_labels=classes).sample
        if guided:
            of_class, of_none = noise.chunk(2)
            noise = of_none + guidance * (of_class - of_none)
        x = scheduler.step(noise, t, x).prev_sample
    return (x / 2 + 0.5).clamp(0, 1).cpu()


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw, compare, write the picture."""
    options = parse_arguments(arguments)
    try:
        config = None if options.config is None else as_config(options.config)
        net: Any = load_model(options.run / "pipeline" / PART, device=options.device).eval()
        scheduler = DDIMScheduler.from_pretrained(options.run / "pipeline" / "scheduler")
    except (ModiffError, OSError) as error:
        raise SystemExit(str(error).splitlines()[0]) from error
    classes = net.config.num_embeds_ada_norm
    labels = torch.arange(classes).repeat_interleave(classes)
    settings = {"steps": options.steps, "guidance": options.guidance, "seed": options.seed}
    exact = images = draw(net, scheduler, labels, **settings)
    if config is not None:
        modiff.apply(net, config)
        with modiff.trajectory(net):
            images = draw(net, scheduler, labels, **settings)
        print(f"{options.config}: relative L2 {relative_l2(images.numpy(), exact.numpy()):.4f} to full precision")
    draw_grid((images * 255).round().to(torch.uint8), options.output, side=classes)
    print(f"saved {options.output}")


if __name__ == "__main__":
    main()
