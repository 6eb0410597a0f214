"""How many rows of residual codes are silent, so that a product could leave them out; what does it cost to have more?

python bench/sampling/silent_rows.py --json docs/results/silent_rows.json
python bench/sampling/silent_rows.py --model text --json docs/results/silent_rows_text.json

A row is what a product sees at once: a token of a linear layer, a pixel of a convolution. It is silent where all of its
codes are zero. A dead zone of d does not send what is smaller than d scales (rounding alone: 0.5); that stays in the
residual of the next step. One scale for a sample: where each token has its own, no token is silent. A layer is silent
where no row of it sends anything. Errors: of the images, or of the logits that the small text model, a transformer, has
on the sequences of its trajectory in full precision.
"""

import argparse
import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from tqdm import tqdm

import modiff
from modiff.assets import EMBEDDED, text_folder
from modiff.cli.options import quiet_pipeline
from modiff.config import ModiffConfig
from modiff.core.quantizer import Code, Quantizer
from modiff.evaluate.metrics.paired import relative_l2
from modiff.files import check_writable, write_json
from modiff.generate.environment import environment
from modiff.hosts.diffusers.runs import noise_generators
from modiff.sampling.masked import MaskedTextPipeline

BITS, ZONES = (4, 3, 2), (0.5, 0.75, 1.0)


def config_of(bits: int) -> ModiffConfig:
    """Modulated, 8-bit weights, one scale for a sample in every layer."""
    config = modiff.presets.modulated(8, bits)
    activation = dataclasses.replace(config.layer.activation, granularity="sample")
    return dataclasses.replace(config, layer=dataclasses.replace(config.layer, activation=activation))


@contextmanager
def dead_zone(size: float, counts: Counter[str]) -> Iterator[None]:
    """Residuals below `size` scales are not sent; counts codes and rows, and the silent ones among them."""
    code_of: Callable[..., Code] = Quantizer.scaled

    def scaled(quantizer: Quantizer, residual: Tensor, scales: Any) -> Code:
        """`Quantizer.scaled`, with the dead zone."""
        code = code_of(quantizer, residual, scales)
        runs = quantizer.split(residual)
        parts = tuple(
            (codes.masked_fill(run.abs() < size * q.scale, 0) if size > 0.5 else codes, q)
            for run, (codes, q) in zip(runs, code.parts, strict=True)
        )
        zero = torch.cat([codes == 0 for codes, _ in parts], code.channel_dim)
        silent = zero.all(code.channel_dim)
        kind = "tokens" if code.channel_dim == -1 else "pixels"
        for name, flags in ((kind, silent), ("codes", zero), ("layers", zero.all()[None])):
            counts[name] += flags.numel()
            counts[f"silent {name}"] += int(flags.sum())
        return Code(parts, code.channel_dim)

    with mock.patch.object(Quantizer, "scaled", scaled):
        yield


def row_of(pipe: Any, bits: int, zone: float, draw: Callable[[], Any], exact: Any) -> dict[str, Any]:
    """One line of the table."""
    counts: Counter[str] = Counter()
    modiff.apply(pipe, config_of(bits))
    try:
        with dead_zone(zone, counts):
            images = draw()
    finally:
        modiff.remove(pipe)
    shares = {name: counts[f"silent {name}"] / max(counts[name], 1) for name in ("tokens", "pixels", "codes", "layers")}
    return {"bits": bits, "dead_zone": zone, "relative_l2": relative_l2(images, exact), "silent": shares}


def images_of(options: argparse.Namespace) -> tuple[Any, Callable[[], Any], Any]:
    """The embedded U-Net, what draws its images from the same noise, and those of full precision."""
    pipe = quiet_pipeline(EMBEDDED, "cpu")

    def draw() -> Any:
        noise = noise_generators(0, range(options.num_images))
        return pipe(len(noise), noise, num_inference_steps=options.steps, output_type="np").images

    return pipe, draw, draw()


def logits_of(options: argparse.Namespace) -> tuple[Any, Callable[[], Tensor], Tensor]:
    """The small text model, what gives its logits on the sequences of one trajectory, and those of full precision."""
    pipe: Any = MaskedTextPipeline.from_pretrained(text_folder())
    calls: list[tuple[Tensor, Tensor]] = []
    hook = pipe.model.register_forward_hook(lambda _, args, output: calls.append((args[0].clone(), output.logits)))
    pipe(options.num_images, 128, options.steps, generator=noise_generators(0, range(options.num_images)))
    hook.remove()

    def draw() -> Tensor:
        with torch.no_grad(), modiff.trajectory(pipe):
            return torch.stack([pipe.model(tokens).logits for tokens, _ in calls])

    return pipe, draw, torch.stack([logits for _, logits in calls])


MODELS = {"embedded": images_of, "text": logits_of}


def main(argv: Sequence[str] | None = None) -> None:
    """A line for each bit width and dead zone."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="embedded")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--num-images", type=int, default=4)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(argv)
    if options.json is not None:
        check_writable(options.json)
    pipe, draw, exact = MODELS[options.model](options)
    rows = [row_of(pipe, bits, zone, draw, exact) for bits, zone in tqdm([(b, z) for b in BITS for z in ZONES])]
    print(
        "| bits | dead zone | silent tokens | silent pixels | codes of zero | silent layers | relative L2 |\n"
        "|--:|--:|--:|--:|--:|--:|--:|"
    )
    for row in rows:
        shares = " | ".join(f"{100 * share:.1f} %" for share in row["silent"].values())
        print(f"| {row['bits']} | {row['dead_zone']} | {shares} | {row['relative_l2']:.4f} |")
    if options.json is not None:
        settings = {"model": options.model, "steps": options.steps, "num_images": options.num_images}
        write_json(options.json, {"settings": settings, "rows": rows, "environment": dict(environment())})


if __name__ == "__main__":
    main()
