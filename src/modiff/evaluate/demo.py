"""What `modiff demo` runs: one model, one noise, a row for each way to make it cheaper."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from diffusers import DiffusionPipeline
from PIL import Image

from modiff import presets
from modiff.api import tune
from modiff.config import ModiffConfig, ModulationConfig
from modiff.errors import ConfigError
from modiff.evaluate.cost import FULL_PRECISION_BITS, LayerCost, trajectory_gbops
from modiff.evaluate.pipelines import (
    Sampled,
    aligned,
    check_pipeline,
    evaluations_bar,
    image_error,
    measure_step,
    number,
    run_config,
)
from modiff.generate.environment import Environment, environment
from modiff.generate.pictures import grid
from modiff.generate.samplers import set_scheduler
from modiff.hosts.diffusers.runs import calibration_run, noise_generators
from modiff.model.tune import FINALISTS

FEWEST_STEPS = 4
EVERY = 10
"""Steps from one anchor of a layer to the next, in the rows that anchor again."""
TUNING_SEED = 1_000_003
"""Added to the seed: tuning never sees the noise that its rows are judged on."""

_FOOTNOTE = """\
Relative L2 and PSNR: final images in [0, 1] against the full-precision run from the same noise.
GBOPs: MACs x weight bits x activation bits of one image, all steps. Steps that anchor count at 32-bit activations, with
exact weights at 32 x 32 bits, as layers in full precision and attention products do. Bit-operations are not speed.
Anchors: modulated runs start from the exact weights; "quantized anchor" is the paper's form.
State MiB: measured at the end of the trajectory, whole batch, input and output states.
Seconds: this run, whole batch. Integers are simulated in float here, so quantized rows are slower, not faster."""


@dataclass(frozen=True)
class DemoPlan:
    """A row to be run: `config` None is full precision, `tuned_bits` asks for a config tuned at that width."""

    name: str
    steps: int
    config: ModiffConfig | None = None
    tuned_bits: int | None = None


@dataclass(frozen=True)
class Demo:
    """The result: rows, their images (N, H, W, C) in [0, 1], the tuned configs by bits, and where it ran.

    rows: plain values. 32 bits are full precision; None is what has no meaning for the row, or is not finite.
    """

    rows: tuple[dict[str, Any], ...]
    images: tuple[np.ndarray, ...]
    tuned: dict[int, ModiffConfig]
    settings: dict[str, Any]
    environment: Environment

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, images left out."""
        return {
            "rows": list(self.rows),
            "settings": self.settings,
            "tuned": {str(bits): config.to_dict() for bits, config in self.tuned.items()},
            "environment": dict(self.environment),
        }

    def table(self) -> str:
        """The rows as aligned text, with what the columns mean below."""
        head = ("", "steps", "rel. L2", "PSNR dB", "GBOPs", "state MiB", "seconds")
        return f"{aligned([head, *(_cells(row) for row in self.rows)])}\n\n{_FOOTNOTE}"

    def picture(self) -> Image.Image:
        """All images, a row for each setting."""
        return grid([(row["name"], images) for row, images in zip(self.rows, self.images, strict=True)])


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    forms = {"relative_l2": ".4f", "psnr_db": ".1f", "gbops": ".0f" if row["gbops"] >= 100 else ".3g",
             "state_mib": ".1f", "seconds": ".1f"}  # fmt: skip
    return (row["name"], str(row["steps"]), *(number(row[name], form) for name, form in forms.items()))


def plans(steps: int) -> list[DemoPlan]:
    """The rows of the demo in order: steps, plain, modulated, anchors, the ablation, then activations alone."""
    rows = [
        DemoPlan("full precision", steps),
        DemoPlan("half the steps", steps // 2),
        DemoPlan("a quarter of the steps", steps // 4),
    ]
    rows += [DemoPlan(f"plain W8A{b}", steps, presets.plain(8, b)) for b in (8, 4, 3)]
    rows += [DemoPlan(f"modulated W8A{b}", steps, presets.modulated(8, b)) for b in (8, 4, 3, 2)]
    rows += [DemoPlan("modulated W4A8", steps, presets.modulated(4, 8))]
    for w in (8, 4):
        again = _anchored_again(presets.modulated(w, 8))
        rows.append(DemoPlan(f"modulated W{w}A8, quantized anchor", steps, presets.published(w, 8)))
        rows.append(DemoPlan(f"modulated W{w}A8, anchored every {EVERY}", steps, again))
    rows += [DemoPlan("modulated W8A4, no compensation", steps, presets.uncompensated(8, 4))]
    rows += [DemoPlan("plain W32A4", steps, presets.plain(None, 4))]
    rows += [DemoPlan(f"modulated W32A{b}", steps, presets.modulated(None, b)) for b in (4, 3)]
    return rows + [DemoPlan(f"tuned W32A{b}", steps, tuned_bits=b) for b in (4, 3, 2)]


def _anchored_again(config: ModiffConfig) -> ModiffConfig:
    modulation = dataclasses.replace(config.layer.modulation or ModulationConfig(), reanchor_every=EVERY)
    return dataclasses.replace(config, layer=dataclasses.replace(config.layer, modulation=modulation))


def run_demo(
    pipe: DiffusionPipeline, *, steps: int = 50, num_images: int = 8, seed: int = 0, progress: bool = True
) -> Demo:
    """Run every row of the demo on an unconditional pipeline with DDIM; its layers are as before at the end.

    Args:
        steps: of the full-precision run. num_images: generated in one batch, image i from the noise of seed + i.
        progress: a bar on stderr that counts network evaluations.
    Raises: ConfigError for a pipeline that needs a prompt, or fewer steps or images than make sense.
    Cost: 22 trajectories, and for each of three bit widths a tuning pass, which costs as much as several.
    """
    check_pipeline(pipe, "demo", num_images)
    most = pipe.scheduler.config.num_train_timesteps
    if not FEWEST_STEPS <= steps <= most:
        raise ConfigError(
            f"demo: expected {FEWEST_STEPS} to {most} steps, got {steps}. One row runs a quarter of them, and the "
            "model was trained on no more. Use --steps 50."
        )
    pipe = set_scheduler(pipe, "ddim")
    todo = plans(steps)
    passes = sum(p.steps for p in todo) + steps * (1 + FINALISTS) * sum(p.tuned_bits is not None for p in todo)
    rows: list[dict[str, Any]] = []
    images: list[np.ndarray] = []
    tuned: dict[int, ModiffConfig] = {}
    cost = measure_step(pipe, partial(calibration_run(pipe, steps=1, batch=1, seed=seed), 0))
    with evaluations_bar(pipe, passes, progress) as bar:
        for plan in todo:
            config = plan.config
            if plan.tuned_bits is not None:
                bar.set_description(f"tuning {plan.tuned_bits} bits")
                config = tune(pipe, plan.tuned_bits, weight_bits=None, steps=steps, seed=seed + TUNING_SEED)
                tuned[plan.tuned_bits] = config
            bar.set_description(plan.name)
            run = run_config(pipe, config, plan.steps, noise_generators(seed, range(num_images)))
            images.append(run.images)
            rows.append(_row(plan, config, run, images[0], cost))
    settings = {"pipeline": type(pipe).__name__, "sampler": "ddim", "steps": steps, "num_images": num_images,
                "seed": seed}  # fmt: skip
    return Demo(tuple(rows), tuple(images), tuned, settings, environment())


def _row(
    plan: DemoPlan, config: ModiffConfig | None, run: Sampled, reference: np.ndarray, costs: list[LayerCost]
) -> dict[str, Any]:
    modulation = None if config is None else config.layer.modulation
    weight, activation = (None, None) if config is None else (config.layer.weight.bits, config.layer.activation.bits)
    return {
        "name": plan.name,
        "weight_bits": FULL_PRECISION_BITS if weight is None else weight,
        "activation_bits": FULL_PRECISION_BITS if activation is None else activation,
        "modulated": modulation is not None,
        "compensated": modulation and modulation.error_compensation == "closed_loop",
        "anchor_weights": modulation and modulation.anchor_weights,
        "reanchor_every": modulation and modulation.reanchor_every,
        "tuned": plan.tuned_bits is not None,
        "steps": plan.steps,
        **image_error(run.images, reference),
        "gbops": trajectory_gbops(costs, run.report, plan.steps),
        "state_mib": modulation and run.state_bytes / 2**20,
        "seconds": run.seconds,
    }
