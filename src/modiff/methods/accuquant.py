"""AccuQuant: step sizes learned against the error that quantized steps accumulate (Lee et al., NeurIPS 2025)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm import tqdm

from modiff.api import apply, calibrate, collect, reconstruct
from modiff.calibration.data import CalibrationSet
from modiff.calibration.reconstruct.config import ReconstructConfig
from modiff.calibration.reconstruct.layers import evaluating, without_states
from modiff.calibration.reconstruct.learn import ScaleLearner
from modiff.calibration.reconstruct.store import digest_of
from modiff.calibration.replay import replay
from modiff.config import JsonConfig, LayerConfig, ModiffConfig, QuantizerConfig, WeightConfig, check, is_bits
from modiff.core.affine import QParams
from modiff.core.quantizer import Quantizer
from modiff.core.step_sets import set_of
from modiff.errors import ConfigError
from modiff.files import ResumableFolder
from modiff.methods.accuquant_folder import (
    GroupResult,
    load_group,
    noting_sampler,
    sampler_as_recorded,
    save_group,
    settings_of,
)
from modiff.methods.group_error import Group, approximate_gradient, error_of, roll_out
from modiff.methods.parts import keep_rounding, plain_network, trajectories_of, undone_on_error
from modiff.methods.sampler_steps import SamplerSteps
from modiff.methods.work import claim_work
from modiff.model.calibrate import quantizers_of
from modiff.model.report import Report

Objective = Literal["group_end", "each_step"]


@dataclass(frozen=True, kw_only=True)
class AccuquantConfig(JsonConfig):
    """AccuQuant's settings. The paper's text and code are not public: these are a reconstruction from its abstract.

    weight_bits, activation_bits: activations have one static scale per layer and group of steps.
    group_size: at most so many steps share scales and are judged by where they arrive together; 1 calibrates each step
        on the quantized trajectory. Reviews report that too large a group is worse than none; there is no rule.
    objective: "group_end" minimises the error at the end of the group, with the approximate gradient; "each_step" the
        error after each step, the states before it taken as given. Both are the same for group_size 1.
    steps: of the sampler, the same that will be used. samples: trajectories to learn from, `batch` at a time.
    iterations: Adam steps a group. learning_rate: of the logarithm of the scales.
    rounding: of weights, "nearest" (ranges of least error), or learned first with `reconstruction`.
    layers: "all", as the methods it is compared with, or "recommended": what ModiffConfig takes by default, without the
        first and the last layer and the embeddings.
    seed: of noise and classes.
    """

    weight_bits: int | None = 8
    activation_bits: int = 8
    group_size: int = 4
    objective: Objective = "group_end"
    steps: int = 50
    samples: int = 16
    batch: int = 8
    iterations: int = 20
    learning_rate: float = 0.02
    rounding: Literal["nearest", "learned"] = "nearest"
    reconstruction: ReconstructConfig = field(default_factory=ReconstructConfig.quick_weights)
    layers: Literal["all", "recommended"] = "all"
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        where = "AccuquantConfig"
        check(f"{where}.weight_bits", self.weight_bits, is_bits(self.weight_bits), "None or 2 to 8", "8 is a good one.")
        bits = self.activation_bits
        check(f"{where}.activation_bits", bits, is_bits(bits), "2 to 8", "Scales of activations are what is learned.")
        for name in ("group_size", "steps", "samples", "batch", "iterations"):
            check(
                f"{where}.{name}", getattr(self, name), getattr(self, name) >= 1, "1 or more", "There is nothing to do."
            )
        check(
            f"{where}.learning_rate", self.learning_rate, self.learning_rate > 0, "more than 0", "0.02 is a good one."
        )
        check(f"{where}.samples", self.samples, self.samples % self.batch == 0, f"a multiple of batch={self.batch}",
              "Trajectories run in whole batches.")  # fmt: skip

    @property
    def groups(self) -> int:
        """Sets of scales: groups of at most `group_size` neighbouring steps, as equal as can be."""
        return -(-self.steps // self.group_size)

    def layer(self) -> LayerConfig:
        """Of each quantized layer."""
        activation = QuantizerConfig(
            bits=self.activation_bits, granularity="tensor", symmetric=False, dynamic=False, step_groups=self.groups
        )
        return LayerConfig(
            weight=WeightConfig(bits=self.weight_bits, search="mse"), activation=activation, modulation=None
        )

    def model_config(self) -> ModiffConfig:
        """All layers alike."""
        if self.layers == "recommended":
            return ModiffConfig(layer=self.layer())
        return ModiffConfig(layer=self.layer(), exclude=(), first_last="quantize", min_weights=0)


@dataclass(frozen=True)
class GroupLoss:
    """steps: first and last index. before, after: ||x^q - x^fp||² at its end, with calibrated and with kept scales."""

    steps: tuple[int, int]
    before: float
    after: float


@dataclass(frozen=True)
class AccuquantReport(Report):
    """What was quantized, and the error at the end of each group, before and after learning."""

    groups: tuple[GroupLoss, ...] = ()


def apply_accuquant(
    pipe: Any,
    config: AccuquantConfig | None = None,
    *,
    run: Callable[[int], object] | None = None,
    evaluations_per_run: int | None = None,
    guidance_scale: float | None = None,
    folder: str | Path | None = None,
    progress: bool = True,
) -> AccuquantReport:
    """Quantize a pipeline's denoiser by AccuQuant, in place; `modiff.remove(pipe)` undoes it.

    Groups are learned from the noisiest on, each from the states that the quantized groups before it arrive at. Scales
    that are no better at the end of their group than the calibrated ones are not kept.

    Args:
        pipe: a pipeline with DDIM (eta 0) or flow-matching Euler steps and one evaluation a step.
        run: `run(i)` generates the `config.batch` images of trajectory i; needed where the pipeline takes a prompt.
        evaluations_per_run: of the network in a trajectory; asked of the scheduler when None.
        guidance_scale: of guidance with both branches in one batch.
        folder: keeps the trajectories and each finished group, so that an interrupted job goes on, to the same bits.
    Raises: ConfigError or CalibrationError if the pipeline cannot be calibrated so; FormatError for a folder that is
        damaged or another job's. The pipeline is as before then.
    Cost: `samples` full-precision trajectories, then for each group `iterations` times its steps, forward twice and
        backward once. Memory: one network graph of `batch` rows, whatever the group size; while ranges are measured, at
        most 1 MiB for each layer and step, of the values that their search looks at.
    """
    config = config or AccuquantConfig()
    if isinstance(pipe, nn.Module):
        raise ConfigError(
            "apply_accuquant: expected a pipeline, got a module alone. Where steps arrive depends on the sampler. "
            "Give the pipeline."
        )
    model = plain_network(pipe, "apply_accuquant")
    run, evaluations = trajectories_of(
        pipe, run, evaluations_per_run, steps=config.steps, batch=config.batch, seed=config.seed
    )
    work, count = claim_work(folder, pipe, "accuquant", config), config.samples // config.batch
    run, calls_folder = noting_sampler(run, pipe.scheduler, work), None if work is None else work / "calls"
    calls = collect(pipe, run, trajectories=count, steps=evaluations, folder=calls_folder, progress=progress)
    recorded = _trajectories(calls, count)
    scheduler = sampler_as_recorded(pipe.scheduler, work)
    steps = [SamplerSteps(model, scheduler, trajectory, guidance_scale) for trajectory in recorded]
    report = apply(pipe, config.model_config())
    with undone_on_error(pipe):
        if config.rounding == "learned":
            weights = None if work is None else work / "weights"
            reconstruct(pipe, calls, config.reconstruction, folder=weights, progress=progress)
        keep_rounding(model)
        calibrate(pipe, lambda: replay(model, calls, progress=progress), observer="mse")
        with _group_folder(work, config, scheduler, guidance_scale, model, calls) as groups, evaluating(model):
            losses = _learn(model, steps, config, None if groups is None else groups.path, progress)
    return AccuquantReport(report.entries, tuple(losses))


def _group_folder(
    work: Path | None,
    config: AccuquantConfig,
    scheduler: Any,
    guidance_scale: float | None,
    model: nn.Module,
    calls: CalibrationSet,
) -> Any:
    if work is None:
        return nullcontext()
    settings = settings_of(config, scheduler, guidance_scale)
    settings["learned from"] = digest_of(None, (*model.parameters(), *model.buffers()), calls)
    return ResumableFolder(work / "groups", settings, items="unit-*")


def _trajectories(calls: CalibrationSet, count: int) -> list[list[Any]]:
    found: list[list[Any]] = [[] for _ in range(count)]
    for call in calls:
        if call.context != "default":
            raise ConfigError(
                "apply_accuquant: expected one evaluation a step, got guidance in two calls. A step's output comes "
                "from both. Sample without guidance, or with both branches in one batch."
            )
        found[call.trajectory].append(call)
    return found


def _learn(
    model: nn.Module, trajectories: list[SamplerSteps], config: AccuquantConfig, folder: Path | None, progress: bool
) -> list[GroupLoss]:
    """Group after group; `states` are where the quantized trajectories stand."""
    quantizers = quantizers_of(model)
    states = [t.recorded[0] for t in trajectories]
    losses: list[GroupLoss] = []
    for index, members in enumerate(tqdm(_members(model, trajectories[0]), desc="groups", disable=not progress)):
        path = None if folder is None else folder / f"unit-{index:04d}.safetensors"
        if path is not None and path.exists():
            result = load_group(path)
        else:
            target = [t.recorded[members[-1] + 1] for t in trajectories]
            groups = [Group(members, start, end) for start, end in zip(states, target, strict=True)]
            result = _learn_group(model, trajectories, groups, index, config)
            if path is not None:
                save_group(path, result)
        for name, scales in result.scales.items():
            _keep(quantizers[name], index, scales)
        states = [state.to(before.device) for state, before in zip(result.states, states, strict=True)]
        losses.append(GroupLoss(result.steps, result.before, result.after))
    return losses


def _members(model: nn.Module, trajectory: SamplerSteps) -> list[list[int]]:
    """The steps of each set of scales, as calibration grouped them."""
    quantizer = next(iter(quantizers_of(model).values()))
    steps = range(len(trajectory.calls))
    if quantizer.tables is None:
        return [list(steps)]
    sets = [set_of((trajectory.timestep(step),), quantizer.moments) for step in steps]
    return [[step for step in steps if sets[step] == index] for index in sorted(quantizer.tables)]


def _learn_group(
    model: nn.Module, trajectories: list[SamplerSteps], groups: list[Group], index: int, config: AccuquantConfig
) -> GroupResult:
    """Learn one set of scales. The layers are as before."""
    quantizers = quantizers_of(model)
    with without_states(model, "quantized") as trainees:
        starts = {n: _scales(quantizers[n], index) for n, t in trainees.items() if t.quantized.quantizer is not None}
        holders = {n: trainees[n] for n in starts}
        learner = ScaleLearner(holders, starts)
        leaves = learner.begin()
        before, first = _arrive(trajectories, groups)
        optimizer = torch.optim.Adam(leaves, lr=config.learning_rate)
        for iteration in range(config.iterations):
            which = iteration % len(groups)
            for part in _parts(groups[which], trajectories[which], config.objective):
                _, gradients = approximate_gradient(
                    part, trajectories[which].evaluate, trajectories[which].advance, leaves
                )
                for leaf, gradient in zip(leaves, gradients, strict=True):
                    leaf.grad = gradient
                optimizer.step()
        after, arrived = _arrive(trajectories, groups)
        ends = groups[0].steps[0], groups[0].steps[-1]
        if not after < before:
            return GroupResult(ends, before, before, {}, first)
        kept = {name: tuple(scale.frozen() for scale in holder.scales) for name, holder in holders.items()}
    return GroupResult(ends, before, after, kept, arrived)


def _parts(group: Group, steps: SamplerSteps, objective: Objective) -> Iterator[Group]:
    """What one iteration descends on: the group, or step after step, each from where the present scales lead."""
    if objective == "group_end":
        yield group
        return
    state = group.start
    for step in group.steps:
        part = Group([step], state, steps.recorded[step + 1])
        yield part
        state = roll_out(part, steps.evaluate, steps.advance)[0][-1]


def _arrive(trajectories: list[SamplerSteps], groups: list[Group]) -> tuple[float, list[Tensor]]:
    """The error at the end of the group, mean over all rows, and the states there."""
    pairs = zip(groups, trajectories, strict=True)
    arrived = [roll_out(group, steps.evaluate, steps.advance)[0][-1] for group, steps in pairs]
    errors = [float(error_of(state, group.target)) for state, group in zip(arrived, groups, strict=True)]
    return sum(errors) / len(errors), arrived


def _scales(quantizer: Quantizer, index: int) -> tuple[QParams, ...]:
    return (quantizer.static or ()) if quantizer.tables is None else quantizer.tables[index]


def _keep(quantizer: Quantizer, index: int, scales: tuple[QParams, ...]) -> None:
    old = _scales(quantizer, index)
    moved = tuple(
        QParams(q.scale.to(o.scale.device), None if q.zero_point is None else q.zero_point.to(o.scale.device))
        for q, o in zip(scales, old, strict=True)
    )
    if quantizer.tables is None:
        quantizer.static = moved
    else:
        quantizer.tables[index] = moved
