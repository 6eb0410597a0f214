"""What `modiff demo` runs: one model, one noise, a row for each way to make it cheaper."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from diffusers import DiffusionPipeline
from PIL import Image

from modiff import presets
from modiff.api import tune
from modiff.config import ModiffConfig, ModulationConfig
from modiff.errors import ConfigError
from modiff.evaluate.cost import FULL_PRECISION_BITS, LayerCost, trajectory_gbops
from modiff.evaluate.metrics.paired import psnr, relative_l2
from modiff.evaluate.pipelines import Sampled, check_pipeline, evaluations_bar, measure_step, run_config
from modiff.evaluate.table import aligned, number
from modiff.generate.environment import Environment, environment
from modiff.generate.grid import grid
from modiff.generate.samplers import set_scheduler
from modiff.hosts.diffusers.runs import noise_generators, unconditional_run
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


@dataclass(frozen=True, kw_only=True)
class DemoRow:
    """One line of the demo. 32 bits are full precision; None is what has no meaning for the row, or is not finite."""

    name: str
    weight_bits: int
    activation_bits: int
    modulated: bool
    compensated: bool | None
    anchor_weights: str | None
    reanchor_every: int | None
    tuned: bool
    steps: int
    relative_l2: float | None
    psnr_db: float | None
    gbops: float
    state_mib: float | None
    seconds: float


@dataclass(frozen=True)
class DemoPlan:
    """A row to be run: `config` None is full precision, `tuned_bits` asks for a config tuned at that width."""

    name: str
    steps: int
    config: ModiffConfig | None = None
    tuned_bits: int | None = None


@dataclass(frozen=True)
class Demo:
    """The result: rows, their images (N, H, W, C) in [0, 1], the tuned configs by bits, and where it ran."""

    rows: tuple[DemoRow, ...]
    images: tuple[np.ndarray, ...]
    tuned: dict[int, ModiffConfig]
    settings: dict[str, Any]
    environment: Environment

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, images left out."""
        return {
            "rows": [dataclasses.asdict(row) for row in self.rows],
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
        return grid([(row.name, images) for row, images in zip(self.rows, self.images, strict=True)])


def _cells(row: DemoRow) -> tuple[str, ...]:
    return (
        row.name,
        str(row.steps),
        number(row.relative_l2, ".4f"),
        number(row.psnr_db, ".1f"),
        number(row.gbops, ".0f" if row.gbops >= 100 else ".3g"),
        number(row.state_mib, ".1f"),
        number(row.seconds, ".1f"),
    )


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
    pipe = _checked(pipe, steps, num_images)
    todo = plans(steps)
    passes = sum(p.steps for p in todo) + steps * (1 + FINALISTS) * sum(p.tuned_bits is not None for p in todo)
    rows: list[DemoRow] = []
    images: list[np.ndarray] = []
    tuned: dict[int, ModiffConfig] = {}
    cost = measure_step(pipe, unconditional_run(pipe, 1, 1, seed))
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


def _checked(pipe: DiffusionPipeline, steps: int, num_images: int) -> DiffusionPipeline:
    """The pipeline with DDIM, if the demo can run on it."""
    check_pipeline(pipe, "demo", num_images)
    most = pipe.scheduler.config.num_train_timesteps
    if not FEWEST_STEPS <= steps <= most:
        raise ConfigError(
            f"demo: expected {FEWEST_STEPS} to {most} steps, got {steps}. One row runs a quarter of them, and the "
            "model was trained on no more. Use --steps 50."
        )
    return set_scheduler(pipe, "ddim")


def _row(
    plan: DemoPlan, config: ModiffConfig | None, run: Sampled, reference: np.ndarray, cost: list[LayerCost]
) -> DemoRow:
    modulation = None if config is None else config.layer.modulation
    return DemoRow(
        name=plan.name,
        weight_bits=_bits(config and config.layer.weight.bits),
        activation_bits=_bits(config and config.layer.activation.bits),
        modulated=modulation is not None,
        compensated=None if modulation is None else modulation.error_compensation == "closed_loop",
        anchor_weights=None if modulation is None else modulation.anchor_weights,
        reanchor_every=None if modulation is None else modulation.reanchor_every,
        tuned=plan.tuned_bits is not None,
        steps=plan.steps,
        relative_l2=_finite(relative_l2(run.images, reference)),
        psnr_db=_finite(psnr(run.images, reference)),
        gbops=trajectory_gbops(cost, run.report, plan.steps),
        state_mib=None if modulation is None else run.state_bytes / 2**20,
        seconds=run.seconds,
    )


def _bits(bits: int | None) -> int:
    return FULL_PRECISION_BITS if bits is None else bits


def _finite(value: float) -> float | None:
    """JSON has neither infinity (the PSNR of equal images) nor NaN (a run that diverged)."""
    return value if math.isfinite(value) else None
