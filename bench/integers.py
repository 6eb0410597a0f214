"""Do integers give the images of the simulation, and what do states in 16 bits cost? On the embedded model.

python bench/integers.py --json docs/results/integers.json
python bench/integers.py --memory budgets --json docs/results/state_memory.json
python bench/integers.py --memory states --num-images 8 --rounds 1 --json docs/results/state_bits.json
python bench/integers.py --memory sizes

The others are about memory. Budgets: `apply(..., state_memory=)` keeps the states of some layers, the others run plain;
relative L2 of the images to full precision, DDIM with 20 steps; "measured" has `run=`, "smallest" has not.
States of each type, and of fewer bits than kernels keep: bytes, errors of images over those with float32, seconds.
Sizes: of published models, by shapes alone, and what a budget of 2 GiB leaves.
"""

import argparse
import dataclasses
import inspect
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import diffusers
import numpy as np
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor
from tqdm import tqdm

import modiff
from modiff import ModiffConfig, ModulationConfig, presets
from modiff.config import StateDtype
from modiff.core.affine import QParams
from modiff.core.recursion import State, Update
from modiff.evaluate.metrics.paired import relative_l2
from modiff.evaluate.pipelines import DrawnImages, PipelineSource
from modiff.files import check_writable, write_json
from modiff.generate.environment import environment
from modiff.generate.samplers import set_scheduler
from modiff.hosts.diffusers.load import load_pipeline
from modiff.hosts.diffusers.runs import calibration_run
from modiff.kernels.isa import detect
from modiff.nn.loop.int16 import HEADROOM
from modiff.nn.loop.simulated import InputState, Memory, SimulatedLoop

STEPS = 20
"""Of all that is about memory."""
SHARES = (1.0, 0.75, 0.5, 0.25, 0.0)


def with_states(config: ModiffConfig, state_dtype: StateDtype) -> ModiffConfig:
    """On integers, with both states in a dtype."""
    config = config.on_integers()
    modulation = dataclasses.replace(config.layer.modulation or ModulationConfig(), state_dtype=state_dtype)
    return dataclasses.replace(config, layer=dataclasses.replace(config.layer, modulation=modulation))


ROWS: dict[str, ModiffConfig] = {
    f"{name} {how}": make(config)
    for name, config in (("W8A8", presets.w8a8()), ("W8A4", presets.w8a4()))
    for how, make in (
        ("simulated", lambda c: c),
        ("on integers, states in float32", partial(with_states, state_dtype="float32")),
        ("on integers", ModiffConfig.on_integers),
    )
}


def measure(pipe: Any, steps: int, num_images: int, seed: int) -> list[dict[str, Any]]:
    """One row a config: distance to full precision and to the simulation, and what the states take."""

    source = PipelineSource(pipe, seed=seed)

    def run(config: ModiffConfig | None) -> DrawnImages:
        with source.open(config, steps) as draw:
            return draw(range(num_images))

    exact, rows, simulated = run(None).images, [], None
    for name, config in tqdm(ROWS.items(), unit="row"):
        sampled = run(config)
        simulated = sampled.images if name.endswith("simulated") else simulated
        rows.append(
            {
                "name": name,
                "relative_l2": relative_l2(sampled.images, exact),
                "to_simulation": relative_l2(sampled.images, simulated),
                "state_mib": sampled.state_bytes / 2**20,
            }
        )
    return rows


def images(draw: Callable[[int], Any], pipe: Any, index: int, apply: Callable[[], object] | None) -> tuple[Any, int]:
    """(N, H, W, C), and the bytes of states that they took."""
    if apply is None:
        return draw(index), 0
    apply()
    try:
        return draw(index), modiff.report(pipe).memory.states
    finally:
        modiff.remove(pipe)


def budgets(pipe: Any, name: str, num_images: int, steps: int = STEPS) -> list[dict[str, Any]]:
    """A row for each share of the states' bytes and each rule."""
    run = calibration_run(pipe, steps=steps, batch=num_images)
    exact = images(run, pipe, 0, None)[0]
    whole, rows = modiff.apply(pipe, name).memory.expected, list[dict[str, Any]]()  # of one image, as budgets are
    modiff.remove(pipe)
    for share in tqdm(SHARES, desc=name):
        budget = max(1, int(share * whole))
        for rule, trial in (("measured", lambda: run(0)), ("smallest", None)):
            fit = partial(modiff.apply, pipe, name, state_memory=budget, run=trial)
            kept, size = images(run, pipe, 0, fit)
            row = {"config": name, "share": share, "rule": rule, "mib": size / num_images / 2**20}
            rows.append(row | {"relative_l2": relative_l2(kept, exact)})
    return rows


class Narrow(NamedTuple):
    """Bits of states that no kernel keeps, in simulation; None is float32.

    inputs: exact on a grid for each row, scales being the nearest multiples of it: no residual is sent more finely than
        the grid, and what saturates is sent later.
    outputs: rounded at each step to a grid for each row and channel: after n steps the error is sqrt(n / 12) of it.
    """

    inputs: int | None
    outputs: int | None


@contextmanager
def narrowed(narrow: Narrow) -> Iterator[dict[object, int]]:
    """Simulated layers keep such states in the body. Yields: the bits of each state that there was."""
    grids, bits = dict[str, list[Tensor]](), dict[object, int]()
    encode, take = InputState.encoded, SimulatedLoop.take

    def encoded(self: InputState, x: Tensor, fusion: Any, state: State | None) -> tuple[Update, State]:
        bits["reads", self.spec.name] = x.numel() * (narrow.inputs or 32)
        if narrow.inputs is None:
            return encode(self, x, fusion, state)
        value, axis, quantizer = self.spec.prepared(x, fusion).float(), self.spec.channel_dim, self.quantizer
        if state is None:
            runs = value.split_with_sizes(quantizer.runs, axis)
            grids[self.spec.name] = own = [
                _grid(run, narrow.inputs, (-1,) if axis < 0 else tuple(range(1, x.dim()))) for run in runs
            ]
            value = torch.cat([(r / g).round() * g for r, g in zip(runs, own, strict=True)], axis)
            return Update(value, (), starts=True), State(value)
        residual = value - state.value
        scales = [quantizer.measured(run).scale for run in quantizer.split(residual)]
        steps = zip(scales, grids[self.spec.name], strict=True)
        codes = quantizer.scaled(residual, [QParams((s / g).round().clamp_min(1) * g, None) for s, g in steps])
        return Update(None, (codes,)), State(state.value + codes.value())

    def taken(self: SimulatedLoop, update: Update, memory: Memory, dtype: torch.dtype) -> Tensor:
        output = take(self, update, memory, dtype)
        bits["writes", self.spec.name] = output.numel() * (narrow.outputs or 32)
        if narrow.outputs is not None and isinstance(memory.output, State):
            if update.starts:
                axes = tuple(range(1, output.dim() - 1) if self.spec.channel_dim < 0 else range(2, output.dim()))
                grids[f"{self.spec.name} writes"] = [_grid(memory.output.value, narrow.outputs, axes)]
            (grid,) = grids[f"{self.spec.name} writes"]
            memory.output = State((memory.output.value / grid).round() * grid)
        return output

    with patch.object(InputState, "encoded", encoded), patch.object(SimulatedLoop, "take", taken):
        yield bits


def _grid(x: Tensor, bits: int, axes: tuple[int, ...]) -> Tensor:
    return (HEADROOM * x.abs().amax(axes, keepdim=True) / (2 ** (bits - 1) - 1)).clamp_min(1e-30)


CHOICES: dict[str, StateDtype | Narrow] = {
    "float32": "float32", "float16": "float16", "int16": "int16", "simulated, float32": Narrow(None, None),
    **{f"simulated, {i} and {o} bits": Narrow(i, o) for i, o in ((12, 12), (8, 12), (8, 10), (8, 8))},
}  # fmt: skip
"""Of the input and the output state. Each is compared with the last one before it that has float32."""


def choices(pipe: Any, name: str, num_images: int, rounds: int, steps: int = STEPS) -> list[dict[str, Any]]:
    """A row for each choice: bytes over those of float32, errors of single images over those with float32, time.

    The ratio of errors is a geometric mean over `rounds` batches, with its 95 % interval; seconds are of the processor,
    for an image, the least of all batches.
    """
    run, config = calibration_run(pipe, steps=steps, batch=num_images), presets.as_config(name)
    measured = {choice: list[tuple[float, float]]() for choice in CHOICES}
    shares, errors = dict[str, float](), dict[str, list[float]]()
    for index in tqdm(range(rounds), desc=f"{name}, states"):
        exact = images(run, pipe, index, None)[0]
        whole, base = 0.0, list[float]()
        for choice, how in CHOICES.items():
            states = config if isinstance(how, Narrow) else with_states(config, how)
            with narrowed(how) if isinstance(how, Narrow) else nullcontext({}) as bits:
                start = time.process_time()
                made, size = images(run, pipe, index, partial(modiff.apply, pipe, states))
                seconds = (time.process_time() - start) / num_images
            size = sum(bits.values()) / 8 if bits else size
            each = [relative_l2(i[None], e[None]) for i, e in zip(made, exact, strict=True)]
            whole, base = (size, each) if choice.endswith("float32") else (whole, base)
            shares[choice] = size / whole
            errors.setdefault(choice, []).extend(each)
            measured[choice] += [(float(np.log(e) - np.log(b)), seconds) for e, b in zip(each, base, strict=True)]
    rows = list[dict[str, Any]]()
    for choice, pairs in measured.items():
        logs, times = zip(*pairs, strict=True)
        spread = 1.96 * float(np.std(logs)) / len(logs) ** 0.5
        low, mean, high = (float(np.exp(np.mean(logs) + d)) for d in (-spread, 0, spread))
        seconds = None if isinstance(CHOICES[choice], Narrow) else min(times)
        rows.append({"config": name, "states": choice, "share": shares[choice], "images": len(logs),
                     "relative_l2": float(np.mean(errors[choice])), "error_ratio": mean, "low": low, "high": high,
                     "seconds": seconds})  # fmt: skip
    return rows


WAN = {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}
SIZES: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "Stable Diffusion 1.5": ("StableDiffusionPipeline", "UNet2DConditionModel",
                             {"sample_size": 64, "cross_attention_dim": 768}, "unet"),
    "PixArt": ("PixArtSigmaPipeline", "PixArtTransformer2DModel", {"caption_channels": 4096}, "transformer"),
    "Flux.1 dev": ("FluxPipeline", "FluxTransformer2DModel", {"guidance_embeds": True}, "transformer"),
    "Wan 2.1, 1.3 billion": ("WanPipeline", "WanTransformer3DModel", WAN, "transformer"),
}  # fmt: skip
"""Pipelines of published models: class, that of the network, its settings, its place."""
BUDGET = "2GiB"


def sizes() -> list[dict[str, Any]]:
    """Bytes of states of one generation of the pipeline's usual size, and what a budget keeps; nothing has weights."""
    rows = list[dict[str, Any]]()
    for name, (pipeline, network, settings, place) in SIZES.items():
        with torch.device("meta"):
            model = getattr(diffusers, network)(**settings).eval()
        kind = getattr(diffusers, pipeline)
        names = [name for name, p in inspect.signature(kind.__init__).parameters.items() if p.default is p.empty]
        scheduler = DDIMScheduler() if place == "unet" else FlowMatchEulerDiscreteScheduler()
        pipe = kind(**dict.fromkeys(names[1:]) | {place: model, "scheduler": scheduler})
        for how in ("w8a8", "w8a8:integer"):
            whole = modiff.apply(pipe, how).memory
            modiff.remove(pipe)
            taken = modiff.apply(pipe, how, state_memory=BUDGET).taken
            modiff.remove(pipe)
            plain = sum(entry.config.modulation is None for entry in taken)
            rows.append(
                {"model": name, "config": how, "gib": whole.expected / 2**30, "layers": len(taken), "plain": plain}
            )
            print(
                f"{name:<22} {how:<13} {rows[-1]['gib']:6.2f} GiB, with {BUDGET} {plain} of {len(taken)} layers plain"
            )
    return rows


def memory(pipe: Any, table: str, num_images: int, rounds: int) -> list[dict[str, Any]]:
    """A table of `--memory`, printed too."""
    if table == "states":
        rows = [row for name in ("w8a8", "w8a4", "w4a8") for row in choices(pipe, name, num_images, rounds)]
        for row in rows:
            print(f"{row['config']}, {row['states']:<26} {row['share']:5.3f} of the bytes  {row['relative_l2']:.4f}  "
                  f"{row['error_ratio']:.2f}, {row['low']:.2f} to {row['high']:.2f}  "
                  f"{row['seconds'] or float('nan'):.2f} s")  # fmt: skip
        return rows
    rows = [row for name in ("w8a8", "w8a4") for row in budgets(pipe, name, num_images)]
    for row in rows:
        print(f"{row['config']}, {row['share']:4.0%} of the bytes, {row['rule']}: {row['mib']:5.1f} MiB  "
              f"{row['relative_l2']:.4f}")  # fmt: skip
    return rows


def main() -> None:
    """Print the table; write it where `--json` says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--num-images", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--memory", choices=("budgets", "states", "sizes"), help="what less memory for states costs")
    parser.add_argument("--rounds", type=int, default=4, help="batches for each choice of states")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.json is not None:
        check_writable(options.json)
    pipe = load_pipeline(options.model)
    pipe.set_progress_bar_config(disable=True)
    if options.memory == "sizes":
        results = {"rows": sizes()}
    elif options.memory:
        rows = memory(set_scheduler(pipe, "ddim"), options.memory, options.num_images, options.rounds)
        results = {"rows": rows}
    else:
        results = {"rows": measure(pipe, options.steps, options.num_images, options.seed)}
        for row in results["rows"]:
            print(f"{row['name']:<36} {row['relative_l2']:.4f}  to simulation {row['to_simulation']:.4f}  "
                  f"states {row['state_mib']:.1f} MiB")  # fmt: skip
    if options.json is not None:
        steps = options.steps if options.memory is None else STEPS
        settings = {"model": options.model, "steps": steps, "num_images": options.num_images,
                    "seed": options.seed, "isa": detect().level}  # fmt: skip
        write_json(options.json, results | {"settings": settings, "environment": dict(environment())})


if __name__ == "__main__":
    main()
