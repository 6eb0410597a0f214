"""What `modiff demo` runs: one model, one noise, a row for each way to make it cheaper."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from diffusers import DiffusionPipeline
from PIL import Image

from modiff import presets
from modiff.api import tune
from modiff.config import ModiffConfig, ModulationConfig, check
from modiff.evaluate.cost import FULL_PRECISION_BITS
from modiff.evaluate.pipelines import NOTHING, TUNING_SEED, DrawnImages, PipelineSource, aligned, image_error
from modiff.evaluate.report.charts import GAIN, differences
from modiff.evaluate.report.document import Cell
from modiff.evaluate.suite.plans import Plan
from modiff.evaluate.timing import FULL, PROBED, QUANTIZED
from modiff.generate.environment import Environment, environment
from modiff.generate.job import Conditions
from modiff.generate.pictures import grid
from modiff.generate.samplers import usual_sampler
from modiff.generate.worker import check_inputs
from modiff.model.tune import FINALISTS

EVERY = 10
"""Steps from one anchor of a layer to the next, in the rows that anchor again."""
QUICK = ("full precision", "half the steps", "plain W8A8", "plain W8A4", "modulated W8A8", "modulated W8A4")
"""The rows of `modiff demo --quick`."""
PICTURED, SHOWN = ("full precision", "half the steps", "plain W8A4", "modulated W8A4"), 4
"""The rows of the picture, and how many of their images are in it."""
_LEGEND = f"{{name}}, {{steps}} steps\nright: difference to it,\n{GAIN} times as strong: red\nbrighter, blue darker"
_FOOTNOTE = """\
Relative L2 and PSNR: final images in [0, 1] against the full-precision run from the same noise.
GBOPs: MACs x weight bits x activation bits of one image, all steps. Steps that anchor count at 32-bit activations, with
exact weights at 32 x 32 bits, as layers in full precision and attention products do. Bit-operations are not speed.
Anchors: modulated runs start from the exact weights; "quantized anchor" is the paper's form.
State MiB: measured at the end of the trajectory, whole batch, input and output states.
Seconds: this run, whole batch. Integers are simulated in float here, so quantized rows are slower, not faster."""


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
        """The rows that are PICTURED: their first images, and these less full precision's, all GAIN times as strong."""
        reference = self.images[0][:SHOWN]
        rows: list[tuple[str, np.ndarray]] = []
        for row, images in zip(self.rows, self.images, strict=True):
            name, steps, error, decibels, *_ = _cells(row)
            if name in PICTURED:
                label = f"{name}\n{steps} steps\nrelative L2 {error}\nPSNR {decibels} dB"
                colours = np.broadcast_to(images[:SHOWN], (*reference.shape[:3], 3))
                change = differences(255 * images[:SHOWN], 255 * reference)
                rows.append((label if rows else _LEGEND.format(**row), np.concatenate([colours, change])))
        return grid(rows)


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    forms = {"relative_l2": ".4f", "psnr_db": ".1f", "gbops": ".0f" if row["gbops"] >= 100 else ".3g",
             "state_mib": ".1f", "seconds": ".1f"}  # fmt: skip
    return (row["name"], str(row["steps"]), *(Cell.number(row[name], form).text for name, form in forms.items()))


def plans(steps: int) -> list[Plan]:
    """The rows of the demo in order: steps, plain, modulated, anchors, the ablation, then activations alone.

    The last ones are of the family "tuned": their config is tuned for the model at its bits.
    """
    fewer = {"full precision": 1, "half the steps": 2, "a quarter of the steps": 4}
    configs = {f"plain W8A{b}": presets.plain(8, b) for b in (8, 4, 3)}
    configs |= {f"modulated W8A{b}": presets.modulated(8, b) for b in (8, 4, 3, 2)}
    configs["modulated W4A8"] = presets.modulated(4, 8)
    for w in (8, 4):
        layer = presets.modulated(w, 8).layer
        again = dataclasses.replace(layer.modulation or ModulationConfig(), reanchor_every=EVERY)
        configs[f"modulated W{w}A8, quantized anchor"] = presets.published(w, 8)
        configs[f"modulated W{w}A8, anchored every {EVERY}"] = dataclasses.replace(
            presets.modulated(w, 8), layer=dataclasses.replace(layer, modulation=again)
        )
    configs["modulated W8A4, no compensation"] = presets.uncompensated(8, 4)
    configs["plain W32A4"] = presets.plain(None, 4)
    configs |= {f"modulated W32A{b}": presets.modulated(None, b) for b in (4, 3)}
    configs |= {f"tuned W32A{b}": presets.tuned(None, b) for b in (4, 3, 2)}
    rows = [Plan(name=name, steps=steps // share) for name, share in fewer.items()]
    return rows + [Plan(name=n, steps=steps, config=c, family=n.partition(" ")[0]) for n, c in configs.items()]


def run_demo(
    pipe: DiffusionPipeline,
    *,
    steps: int = 50,
    num_images: int = 8,
    seed: int = 0,
    conditions: Conditions = NOTHING,
    rows: Sequence[Plan] | None = None,
    after_row: Callable[[Demo], object] = lambda demo: None,
    progress: bool = True,
) -> Demo:
    """Run every row of the demo on a pipeline, with DDIM where it can; its layers are as before at the end.
    steps: of the full-precision run. num_images: generated in one batch, image i from the noise of seed + i.
    conditions: what the images are drawn of. rows: of `plans`, or all.
    after_row: called with the rows so far.
    Raises: ConfigError for a pipeline that needs other inputs, or fewer steps or images than make sense.
    Cost: 22 trajectories, and for each of three bit widths a tuning pass, which costs as much as several.
    """
    source = PipelineSource(pipe, sampler=usual_sampler(pipe), seed=seed, conditions=conditions)
    check("steps", steps, steps >= 4, "4 or more", "One row runs a quarter of them. Use steps=50.")
    check("num_images", num_images, num_images >= 1, "at least 1 image", "Use num_images=8.")
    check_inputs(source.pipe, steps, conditions)
    todo = plans(steps) if rows is None else rows
    sampler = usual_sampler(pipe) or type(pipe.scheduler).__name__
    settings = {"pipeline": type(pipe).__name__, "sampler": sampler, "steps": steps, "num_images": num_images,
                "seed": seed, **conditions.to_dict()}  # fmt: skip
    done: list[dict[str, Any]] = []
    images: list[np.ndarray] = []
    tuned: dict[int, ModiffConfig] = {}
    with source.bar(_parts(todo, steps), progress) as bar:
        for plan in todo:
            bar.begin(plan.name)
            config = plan.config
            if config is not None and plan.family == "tuned":
                bits = config.layer.activation.bits or 0
                config = tuned[bits] = tune(
                    source.pipe, bits, weight_bits=None,
                    run=lambda: source.draw(steps, range(4), seed + TUNING_SEED),
                )  # fmt: skip
            with source.open(config, plan.steps) as draw:
                drawn = draw(range(num_images))
            images.append(drawn.images)
            done.append(_row(plan, config, drawn, images[0]))
            result = Demo(tuple(done), tuple(images), dict(tuned), settings, environment())
            after_row(result)
    return result


def _parts(todo: Sequence[Plan], steps: int) -> list[tuple[str, float, int]]:
    """What the bar counts."""
    parts: list[tuple[str, float, int]] = []
    for plan in todo:
        tuning = [(plan.name, PROBED, steps), (plan.name, QUANTIZED, steps * FINALISTS)]
        parts += tuning if plan.family == "tuned" else []
        parts += [(plan.name, FULL if plan.config is None else QUANTIZED, plan.steps)]
    return parts


def _row(plan: Plan, config: ModiffConfig | None, drawn: DrawnImages, reference: np.ndarray) -> dict[str, Any]:
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
        "tuned": plan.family == "tuned",
        "steps": plan.steps,
        **image_error(drawn.images, reference),
        "gbops": drawn.gbops,
        "state_mib": modulation and drawn.state_bytes / 2**20,
        "seconds": drawn.seconds,
    }
