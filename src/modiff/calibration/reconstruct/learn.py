"""Learn what one unit has to learn: Adam on batches of its samples, judged on samples that were held out."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from modiff.calibration.blocks import Block
from modiff.calibration.data import tensors_of
from modiff.calibration.reconstruct.config import ReconstructConfig, UnitReport
from modiff.calibration.reconstruct.layers import Through, Trainee
from modiff.calibration.reconstruct.samples import UnitCall, UnitData
from modiff.core.adaround import AdaRound, beta_at
from modiff.core.affine import QParams
from modiff.core.learned_scale import LearnedScale

Run = Callable[[UnitCall], Any]
"""The unit, on a batch, as its layers compute now."""
Learned = dict[str, Tensor]
"""What was learned, by stable names: "<layer>.0.codes", "<layer>.0.scale", ..., a number for each run of channels."""
Groups = list[dict[str, Any]]
"""Parameters that Adam moves, with a rate for each group."""
WITH_WEIGHTS = "scales of "
"""What names of quantizers begin with where scales are learned together with weights."""


class WeightLearner:
    """AdaRound for the layers of a unit; their rounding must be to nearest when it begins."""

    def __init__(self, trainees: Mapping[str, Trainee], config: ReconstructConfig) -> None:
        self.trainees, self.config = trainees, config
        self._rounding: dict[str, AdaRound] = {}

    def begin(self) -> list[Tensor]:
        """Let the layers compute with what is learned. Returns: the leaves that Adam moves."""
        for name, trainee in self.trainees.items():
            weight, bits = trainee.quantized.quantized_weight, trainee.quantized.config.weight.bits or 8
            values = weight.floats(trainee.quantized.weight).split(list(weight.columns), 1)
            pairs = zip(values, weight.codes(trainee.quantized.weight), strict=True)
            trainee.rounding = tuple(AdaRound(floats, qparams, bits) for floats, (_, qparams) in pairs)
            self._rounding |= {f"{name}.{i}": rounding for i, rounding in enumerate(trainee.rounding)}
        return [rounding.logits for rounding in self._rounding.values()]

    def groups(self) -> Groups:
        """What Adam moves, and at which rate."""
        return [{"params": self.begin(), "lr": self.config.learning_rate}]

    def undecided(self) -> float:
        """The share of weights with h in (.05, .95)."""
        weights = sum(rounding.logits.numel() for rounding in self._rounding.values())
        return sum(rounding.undecided(0.05) for rounding in self._rounding.values()) / weights

    def penalty(self, iteration: int) -> Tensor | float:
        """What is added to the loss of the reconstruction."""
        beta = beta_at(iteration, self.config.iterations)
        if beta is None or self.config.regularizer == 0:
            return 0.0
        return self.config.regularizer * torch.stack([r.penalty(beta) for r in self._rounding.values()]).sum()

    def settled(self) -> bool:
        """Whether nothing will move any more: where h is 0 or 1 its gradient is zero."""
        return not any(rounding.undecided() for rounding in self._rounding.values())

    def result(self) -> Learned:
        """Copies of what the unit would keep if learning ended here."""
        codes = {f"{name}.codes": rounding.codes().cpu() for name, rounding in self._rounding.items()}
        return codes | {f"{n}.scale": r.qparams.scale.detach().cpu().clone() for n, r in self._rounding.items()}


class ScaleLearner:
    """Learned scales of some quantizers; from `starts` on, one for each run of channels, they compute from now on."""

    penalty = staticmethod(lambda iteration: 0.0)
    settled = staticmethod(lambda: False)

    def __init__(
        self, holders: Mapping[str, Trainee | Through], starts: Mapping[str, tuple[QParams, ...]], rate: float = 1e-3
    ) -> None:
        self.holders, self.rate = holders, rate
        for name, holder in holders.items():
            holder.scales = tuple(LearnedScale(start, holder.bits) for start in starts[name])

    def begin(self) -> list[Tensor]:
        """As in `WeightLearner`."""
        return [scale.theta for holder in self.holders.values() for scale in holder.scales]

    def groups(self) -> Groups:
        """As in `WeightLearner`."""
        return [{"params": self.begin(), "lr": self.rate}]

    def result(self) -> Learned:
        """As in `WeightLearner`."""
        learned: Learned = {}
        for name, holder in self.holders.items():
            for i, (scale, zero_point) in enumerate(scale.frozen() for scale in holder.scales):
                learned[f"{name}.{i}.scale"] = scale.cpu()
                if zero_point is not None:
                    learned[f"{name}.{i}.zero_point"] = zero_point.cpu().clone()
        return learned


class JointLearner(WeightLearner):
    """Rounding and static scales of a unit, together."""

    def __init__(self, trainees: Mapping[str, Trainee], scales: ScaleLearner, config: ReconstructConfig) -> None:
        super().__init__(trainees, config)
        self.scales = scales

    def groups(self) -> Groups:
        """As in `WeightLearner`."""
        return super().groups() + self.scales.groups()

    def settled(self) -> bool:
        """Scales may always move."""
        return False

    def result(self) -> Learned:
        """As in `WeightLearner`."""
        return super().result() | {f"{WITH_WEIGHTS}{key}": tensor for key, tensor in self.scales.result().items()}


def learned_scales(learned: Learned, name: str) -> tuple[QParams, ...]:
    """The scales of one layer or quantizer, one for each run of channels."""
    scales: list[QParams] = []
    while (key := f"{name}.{len(scales)}") + ".scale" in learned:
        scales.append(QParams(learned[f"{key}.scale"], learned.get(f"{key}.zero_point")))
    return tuple(scales)


def learned_codes(learned: Learned, name: str) -> tuple[tuple[Tensor, QParams], ...]:
    """The codes and scales of one weight, as `QuantizedWeight.fix` takes them."""
    return tuple((learned[f"{name}.{i}.codes"], qparams) for i, qparams in enumerate(learned_scales(learned, name)))


@torch.inference_mode(False)
def learn(
    block: Block, run: Run, data: UnitData, learner: WeightLearner | ScaleLearner, config: ReconstructConfig,
    generator: torch.Generator, objective: Callable[[UnitCall], Tensor] | None = None,
) -> tuple[Learned | None, UnitReport]:  # fmt: skip
    """Minimise loss + penalty; the best of all checks is kept, if it beats the start on what was held out.

    objective: the loss of a batch where it is not that of the unit's outputs alone, which decides what is kept.
    Returns: what was learned, None where nothing was better, and the report of the unit.
    Cost: `config.iterations` forward and backward passes of the unit, and `config.checks` + 1 of what is held out, one
        more for rounding at each check that is the best so far.
    """
    before = _held_out_loss(run, data, config)
    optimizer = torch.optim.Adam(learner.groups())
    leaves = [leaf for group in optimizer.param_groups for leaf in group["params"]]
    rates = [group["lr"] for group in optimizer.param_groups]
    every = max(1, -(-config.iterations // config.checks))
    best, figures = None, dict[str, float]()
    after, worse, done, reason = before, 0, 0, "all iterations run"
    with torch.enable_grad():
        for iteration in range(config.iterations):
            if config.schedule == "cosine":
                share = 0.5 * (1 + math.cos(math.pi * iteration / config.iterations))
                for group, rate in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = rate * share
            batch = data.draw(config.batch, generator)
            loss = unit_loss(run, batch, config.p) if objective is None else objective(batch)
            gradients = torch.autograd.grad(loss + learner.penalty(iteration), leaves, allow_unused=True)
            for leaf, gradient in zip(leaves, gradients, strict=True):
                leaf.grad = gradient
            optimizer.step()
            done = iteration + 1
            if done % every and done != config.iterations:
                continue
            now = _held_out_loss(run, data, config)
            if now < after:
                best, after, worse = learner.result(), now, 0
                if isinstance(learner, WeightLearner):
                    figures = {"undecided": learner.undecided(), "soft": _held_out_loss(run, data, config, soft=True)}
            elif done > config.iterations / 2:  # before that, h cut at one half says little about where it goes
                worse += 1
            if learner.settled() or (config.patience and worse >= config.patience):
                reason = "every weight is decided" if learner.settled() else f"no better in {worse} checks"
                break
    if best is None:
        reason = "what was learned is no better on the rows held out"
    report = UnitReport(block.name, block.kind, block.layers, before, after, best is not None, done, reason, figures)
    return best, report


def unit_loss(run: Run, batch: UnitCall, p: float) -> Tensor:
    """The loss of the unit on a batch, each row by its weight."""
    return reconstruction_loss(run(batch), batch.targets, p, batch.weights)


def reconstruction_loss(output: Any, targets: list[Tensor], p: float, weights: Tensor | None = None) -> Tensor:
    """Sum over channels of |output - target|^p, mean over everything else, summed over the outputs.

    Channels are axis 1 of images and videos, the last axis of tokens and vectors. weights: of the rows, mean 1.
    """
    outputs = [t for t in tensors_of(output) if t.is_floating_point()]
    losses = []
    for tensor, target in zip(outputs, targets, strict=True):
        wide = torch.promote_types(tensor.dtype, torch.float32)
        distance = (tensor.to(wide) - target.to(wide)).abs().pow(p)
        distance = distance.sum(1 if distance.dim() > 3 else -1)
        if weights is not None:
            distance = distance * weights.view(-1, *[1] * (distance.dim() - 1))
        losses.append(distance.mean())
    return torch.stack(losses).sum()


def _held_out_loss(run: Run, data: UnitData, config: ReconstructConfig, *, soft: bool = False) -> float:
    """Of what is kept, or with `soft` of weights before h is cut at one half."""
    total, rows = 0.0, 0
    for batch in data.held_batches(config.batch):
        with torch.set_grad_enabled(soft):
            total += float(reconstruction_loss(run(batch), batch.targets, config.p).detach()) * batch.rows
        rows += batch.rows
    return total / rows
