"""AccuQuant: scales learned against the error that quantized steps accumulate (Lee et al., NeurIPS 2025).

A group leads from x_t to x_{t-n} by x_{k-1} = advance_k(x_k, eps(x_k)). Its error is L = ||x^q_{t-n} - x^fp_{t-n}||²,
where x^q follows its own states. Exact back-propagation keeps n networks alive. Dropping how a network's output depends
on its own input state (d eps / d x = 0) leaves

    dL/dphi ~ sum_k <p_k, d eps(x^q_k) / dphi>,   p_k = (d x^q_{t-n} / d eps_k)^T 2 (x^q_{t-n} - x^fp_{t-n})

with p_k from the sampler's arithmetic alone: one network graph at a time, whatever n is.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from modiff.calibration.reconstruct.config import ReconstructionReport, UnitReport
from modiff.calibration.reconstruct.layers import evaluating, without_states
from modiff.calibration.reconstruct.learn import Learned, ScaleLearner, learned_scales
from modiff.calibration.reconstruct.store import load_unit, save_unit
from modiff.core.affine import QParams
from modiff.core.quantizer import Quantizer
from modiff.core.step_sets import set_of
from modiff.methods.recipe import MethodConfig, MethodJob, MethodReport, every_layer
from modiff.methods.registry import register
from modiff.methods.sampler_steps import SamplerSteps, record
from modiff.model.calibrate import quantizers_of
from modiff.progress import Bar

Evaluate = Callable[[int, Tensor], Tensor]
"""(step, state) -> what the sampler is told of the network's output, same shape as the state."""
Advance = Callable[[int, Tensor, Tensor], Tensor]
"""(step, state, output) -> the next state; elementwise and differentiable."""


@dataclass(frozen=True)
class Group:
    """Neighbouring steps of one trajectory's rows: where they start, and where full precision arrives.

    steps: indices. start: the quantized state before the first. target: the full-precision state after the last.
    """

    steps: Sequence[int]
    start: Tensor
    target: Tensor


def roll_out(group: Group, evaluate: Evaluate, advance: Advance) -> tuple[list[Tensor], list[Tensor]]:
    """The states (one more than steps) and outputs of the group's steps, without a graph."""
    states, outputs = [group.start], []
    with torch.no_grad():
        for step in group.steps:
            outputs.append(evaluate(step, states[-1]))
            states.append(advance(step, states[-1], outputs[-1]))
    return states, outputs


def error_of(arrived: Tensor, target: Tensor) -> Tensor:
    """||x^q - x^fp||² of a row, mean over the rows; 0-d."""
    return (arrived - target).square().flatten(1).sum(1).mean()


def approximate_gradient(
    group: Group, evaluate: Evaluate, advance: Advance, leaves: Sequence[Tensor]
) -> tuple[float, list[Tensor]]:
    """The error at the group's end, and its gradient without the path through the network's input states.

    Exact for one step. Cost: n evaluations without a graph, n forward and backward, memory of one.
    """
    states, outputs = roll_out(group, evaluate, advance)
    pull = 2 * (states[-1] - group.target) / len(group.start)
    totals = [torch.zeros_like(leaf) for leaf in leaves]
    for step, state, output in zip(reversed(group.steps), states[-2::-1], reversed(outputs), strict=True):
        with torch.enable_grad():
            known, told = state.detach().requires_grad_(), output.detach().requires_grad_()
            following, again = advance(step, known, told), evaluate(step, state)
        on_output, pull = torch.autograd.grad(following, (told, known), pull.to(following.dtype))
        gradients = torch.autograd.grad(again, list(leaves), on_output.to(again.dtype), allow_unused=True)
        for total, gradient in zip(totals, gradients, strict=True):
            if gradient is not None:
                total += gradient
    return float(error_of(states[-1], group.target)), totals


@dataclass(frozen=True, kw_only=True)
class AccuquantConfig(MethodConfig):
    """AccuQuant's settings. The paper's text and code are not public: these are a reconstruction from its abstract.

    weight_bits, activation_bits: activations have one static scale per layer and group of steps.
    group_size: at most this many steps share scales and are judged by where they arrive together; 1 calibrates each
        step on the quantized trajectory. Reviews report that too large a group is worse than none; there is no rule.
    iterations: Adam steps a group. learning_rate: of the logarithm of the scales.
    guidance_scale: of guidance with both branches in one batch; None without guidance.

    Groups are learned from the noisiest on, each from the states that the quantized groups before it arrive at. Scales
    that are no better at the end of their group than the calibrated ones are not kept. For pipelines with DDIM (eta 0)
    or flow-matching Euler steps and one evaluation a step.
    Cost: `samples` full-precision trajectories, then for each group `iterations` times its steps, forward twice and
        backward once. Memory: one network graph of `batch` rows; at most 1 MiB a layer and step for the range search.
    """

    group_size: int = 4
    steps: int = 50
    samples: int | None = 16
    batch: int = 8
    iterations: int = 20
    learning_rate: float = 0.02
    guidance_scale: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("activation_bits", self.activation_bits is not None, "2 to 8", "Their scales are what is learned.")
        for name, number in (("group_size", self.group_size), ("iterations", self.iterations)):
            self.check(name, number >= 1, "1 or more", "There is nothing to do.")
        self.check("learning_rate", self.learning_rate > 0, "more than 0", "0.02 is a good one.")


@register(
    AccuquantConfig,
    modulated="It learns scales of whole activations, and of one step without the steps before it; what a modulated "
    "layer quantizes depends on those",
)
def accuquant(job: MethodJob, config: AccuquantConfig) -> MethodReport:
    """Record trajectories, measure ranges, then learn the scales of group after group."""
    scheduler, recorded = record(job, config.drawn // config.batch, "calls")
    trajectories = [SamplerSteps(job.model, scheduler, evaluations, config.guidance_scale) for evaluations in recorded]
    report = job.apply(every_layer(config.static_layer(step_groups=-(-config.steps // config.group_size))))
    job.keep_rounding()
    job.measure([call for evaluations in recorded for call in evaluations], "mse")
    with evaluating(job.model):
        scales = ReconstructionReport(_learn(job, config, trajectories))
    return MethodReport.of(report, scales=scales)


def _learn(job: MethodJob, config: AccuquantConfig, trajectories: list[SamplerSteps]) -> tuple[UnitReport, ...]:
    quantizers = quantizers_of(job.model)
    states = [t.recorded[0] for t in trajectories]
    units: list[UnitReport] = []
    for index, steps in enumerate(Bar(_groups(job.model, trajectories[0]), desc="groups", shown=job.progress)):
        path = job.path(f"groups/group-{index:04d}.safetensors")
        if path is not None and path.exists():
            learned, unit = load_unit(path)
        else:
            groups = [Group(steps, s, t.recorded[steps[-1] + 1]) for s, t in zip(states, trajectories, strict=True)]
            learned, unit = _learn_group(job.model, trajectories, groups, index, config)
            if path is not None:
                save_unit(path, learned, unit)
        for name in unit.layers:
            quantizer, scales = quantizers[name], learned_scales(learned, name)
            if quantizer.tables is None:
                quantizer.static = scales
            else:
                quantizer.tables[index] = scales
        states = [learned[f"state.{i}"].to(before.device) for i, before in enumerate(states)]
        units.append(unit)
    return tuple(units)


def _groups(model: nn.Module, trajectory: SamplerSteps) -> list[list[int]]:
    quantizer = next(iter(quantizers_of(model).values()))
    steps = range(len(trajectory.calls))
    if quantizer.tables is None:
        return [list(steps)]
    sets = [set_of((float(trajectory.calls[step].timestep or 0.0),), quantizer.moments) for step in steps]
    return [[step for step in steps if sets[step] == index] for index in sorted(quantizer.tables)]


def _learn_group(
    model: nn.Module, trajectories: list[SamplerSteps], groups: list[Group], index: int, config: AccuquantConfig
) -> tuple[Learned, UnitReport]:
    quantizers = quantizers_of(model)
    with without_states(model, "quantized") as trainees:
        holders = {name: t for name, t in trainees.items() if t.quantized.quantizer is not None}
        learner = ScaleLearner(holders, {name: _scales(quantizers[name], index) for name in holders})
        leaves = learner.begin()
        before, arrived = _arrive(trajectories, groups)
        optimizer = torch.optim.Adam(leaves, lr=config.learning_rate)
        for iteration in range(config.iterations):
            which = iteration % len(groups)
            sampler = trajectories[which]
            _, gradients = approximate_gradient(groups[which], sampler.evaluate, sampler.advance, leaves)
            for leaf, gradient in zip(leaves, gradients, strict=True):
                leaf.grad = gradient
            optimizer.step()
        after, arrived_after = _arrive(trajectories, groups)
    better = after < before
    states = {f"state.{i}": s.cpu() for i, s in enumerate(arrived_after if better else arrived)}
    reason = "better at the end of the group" if better else "no better at the end of the group"
    name = f"steps {groups[0].steps[0]} to {groups[0].steps[-1]}"
    unit = UnitReport(name, "group of steps", tuple(holders) if better else (), before, after if better else before,
                      better, config.iterations, reason)  # fmt: skip
    return states | (learner.result() if better else {}), unit


def _arrive(trajectories: list[SamplerSteps], groups: list[Group]) -> tuple[float, list[Tensor]]:
    pairs = zip(groups, trajectories, strict=True)
    arrived = [roll_out(group, sampler.evaluate, sampler.advance)[0][-1] for group, sampler in pairs]
    errors = [float(error_of(state, group.target)) for state, group in zip(arrived, groups, strict=True)]
    return sum(errors) / len(errors), arrived


def _scales(quantizer: Quantizer, index: int) -> tuple[QParams, ...]:
    return (quantizer.static or ()) if quantizer.tables is None else quantizer.tables[index]
