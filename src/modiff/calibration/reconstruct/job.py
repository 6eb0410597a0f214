"""One unit after the other: capture what it is given, learn, and fix what is better into the layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from modiff.calibration.blocks import Block
from modiff.calibration.data import Call
from modiff.calibration.reconstruct.config import ReconstructConfig
from modiff.calibration.reconstruct.layers import Through, Trainee, attention_through, full_precision, without_states
from modiff.calibration.reconstruct.report import UnitReport
from modiff.calibration.reconstruct.unit import (
    Found,
    Outcome,
    StepLearner,
    WeightLearner,
    keep_steps,
    keep_weight,
    learn,
)
from modiff.calibration.reconstruct.unit_data import Batch, UnitData, Visit, capture, paired
from modiff.core.affine import QParams
from modiff.core.observers import MinMaxObserver
from modiff.core.quantizer import Quantizer
from modiff.errors import StateError
from modiff.model.attach import required_attachment
from modiff.model.calibrate import quantizers_of
from modiff.nn import ModulatedLayer

NEVER_RAN = "never ran on the calibration calls"
OUTSIDE = "lies in no block: the scales of its products stay as measured"


class Job:
    """The reconstruction of one model; holds the inputs and targets of one unit at a time."""

    def __init__(self, model: nn.Module, calls: Sequence[Call], config: ReconstructConfig) -> None:
        self.model, self.calls, self.config = model, calls, config
        self.originals = required_attachment(model, "reconstruct").originals
        self.layers = required_attachment(model, "reconstruct").layers
        self.quantizers = quantizers_of(model)

    def learn(self, block: Block, index: int) -> tuple[Found, UnitReport]:
        """Learn one unit. Returns: what it shall keep, {} for nothing new, and its report. The layers are as before."""
        generator = torch.Generator().manual_seed(self.config.seed + index)
        if block.calls == 0:
            return {}, _report(block, Outcome(0.0, 0.0, None, 0, NEVER_RAN))
        if self.config.learn == "residual_steps":
            return self._learn_residual(block, generator)
        data = self._data(block, self._visits(block), generator)
        unit = self.model.get_submodule(block.name)

        def run(batch: Batch) -> Any:
            return unit(*batch.args, **batch.kwargs)

        with without_states(self.model, self.config.activations) as trainees:
            mine = {name: trainees[name] for name in block.layers}
            learner = WeightLearner(mine, self.config) if self.config.learn == "weights" else self._steps(block, mine)
            outcome = learn(run, data, learner, self.config, generator)
        return outcome.best or {}, _report(block, outcome)

    def keep(self, found: Found) -> None:
        """Fix what a unit learned into its layers."""
        for name in dict.fromkeys(key.rpartition(".")[0].rpartition(".")[0] for key in found):
            if self.config.learn == "weights":
                keep_weight(self.layers[name], found, name)
            else:
                keep_steps(self.quantizers[name], found, name)

    def present_tensors(self) -> list[Tensor]:
        """Learned codes and static scales that learning starts from, or codes activations with meanwhile.

        Rounding starts from the weights.
        """
        rounding = self.config.learn == "weights"
        kept = (
            t for n, t in self.layers.items() if t.quantized_weight.fixed and not (rounding and self.config.takes(n))
        )
        fixed = (quantized.quantized_weight.codes(quantized.weight) for quantized in kept)
        found = [tensor for parts in fixed for codes, qparams in parts for tensor in (codes, qparams.scale)]
        if rounding and self.config.activations == "full_precision":
            return found
        return found + [
            tensor for quantizer in self.quantizers.values() for tensor in quantizer.state_dict_tensors().values()
        ]

    @contextmanager
    def undone_on_error(self) -> Iterator[None]:
        """Start from rounding to nearest where rounding is learned; if the body raises, all is as it was before."""
        weights = {
            name: (quantized.quantized_weight, _fixed_parts(quantized))
            for name, quantized in self.layers.items()
            if self.config.learn == "weights" and quantized.config.weight.bits is not None and self.config.takes(name)
        }
        scales = {name: quantizer.static for name, quantizer in self.quantizers.items()}
        for weight, _ in weights.values():
            weight.unfix()
        try:
            yield
        except BaseException:
            for weight, parts in weights.values():
                weight.unfix()
                if parts:
                    weight.fix(parts)
            for name, quantizer in self.quantizers.items():
                quantizer.static = scales[name]
            raise

    def left_out(self, blocks: Sequence[Block]) -> list[UnitReport]:
        """Attention whose scales were to be learned and lie in no unit: they stay as measured."""
        if self.config.learn != "activation_steps":
            return []
        modules = dict.fromkeys(name.rpartition(".")[0] for name in self.quantizers if name not in self.layers)
        outside = [name for name in modules if not any(f"{name}.".startswith(f"{b.name}.") for b in blocks)]
        return [UnitReport(name, "attention", (), 0.0, 0.0, False, 0, OUTSIDE) for name in outside]

    def _visits(self, block: Block) -> list[Visit]:
        """Inputs from the model as quantized so far, targets from full precision."""
        unit = self.model.get_submodule(block.name)
        visits: list[Visit] = []
        for call in self.calls:
            exact = capture(self.model, unit, call, block.calls, full_precision(self.model))
            states = without_states(self.model, self.config.activations)
            visits += paired(capture(self.model, unit, call, block.calls, states), exact, block.name)
        return visits

    def _data(self, block: Block, visits: Sequence[Visit], generator: torch.Generator) -> UnitData:
        unit = self.model.get_submodule(block.name)

        def run(batch: Batch) -> Any:
            with full_precision(self.model):
                return unit(*batch.args, **batch.kwargs)

        device = self.layers[block.layers[0]].weight.device
        return UnitData(visits, run, device=device, held_out=self.config.held_out, generator=generator, name=block.name)

    def _steps(self, block: Block, trainees: Mapping[str, Trainee]) -> StepLearner:
        """The scales of a unit's layers, and of the attention inside it."""
        inside = f"{block.name}."
        through = attention_through(self.model).items()
        attention = {n: c for n, c in through if n.startswith(inside) and self.config.takes(n)}
        holders: dict[str, Trainee | Through] = {**trainees, **attention}
        starts = {name: self.quantizers[name].static for name in holders}
        return StepLearner(
            {name: holder for name, holder in holders.items() if starts[name] is not None},
            {name: start for name, start in starts.items() if start is not None},
        )

    def _learn_residual(self, block: Block, generator: torch.Generator) -> tuple[Found, UnitReport]:
        """The static scale of one layer's residual (MoDiff, 1.5): run on the previous input, then on this one.

        ô_t = A(a_{t+1}) + A(code(a_t - a_{t+1})) + bias = A(a_{t+1} + code(a_t - a_{t+1})) + bias, against A in full
        precision; both inputs are those of full precision.
        """
        name = block.layers[0]
        trainee = Trainee(self.layers[name], "quantized")
        quantizer = self.quantizers[name]
        visits = self._residual_visits(block)

        def residual(batch: Batch) -> Tensor:
            before, now = (trainee.prepare(x) for x in batch.args)
            return trainee.operate(before + trainee.code(now - before))

        data = UnitData(
            visits,
            lambda batch: self.originals[name](batch.args[1]),
            device=self.layers[name].weight.device,
            held_out=self.config.held_out,
            generator=generator,
            name=name,
        )
        learner = StepLearner({name: trainee}, {name: quantizer.static or _widest(trainee, quantizer, visits)})
        start = learner.found()
        outcome = learn(residual, data, learner, self.config, generator)
        return outcome.best or start, _report(block, outcome)

    def _residual_visits(self, block: Block) -> list[Visit]:
        layer = self.model.get_submodule(block.name)
        visits: list[Visit] = []
        for call in self.calls:
            if call.previous is None:
                continue
            before, now = (
                capture(self.model, layer, c, block.calls, full_precision(self.model)) for c in (call.previous, call)
            )
            both = zip(before, now, strict=True)
            visits += [Visit((b.args[0], n.args[0]), {}, n.targets) for b, n in both]
        return visits


def _fixed_parts(quantized: ModulatedLayer) -> tuple[tuple[Tensor, QParams], ...]:
    """The codes fixed into a layer, () where there are none, or they belong to a weight that was there before."""
    try:
        return quantized.quantized_weight.codes(quantized.weight) if quantized.quantized_weight.fixed else ()
    except StateError:
        return ()


def _widest(trainee: Trainee, quantizer: Quantizer, visits: Sequence[Visit]) -> tuple[QParams, ...]:
    """Scales that cover every residual: where learning starts unless some were measured."""
    axis = quantizer.channel_dim if quantizer.granularity == "input_channel" else None
    observers = [MinMaxObserver(axis) for _ in quantizer.segments]
    device = trainee.quantized.weight.device
    for visit in visits:
        before, now = (trainee.prepare(x.to(device)) for x in visit.args)
        parts = (now - before).split(list(quantizer.segments), quantizer.channel_dim)
        for observer, part in zip(observers, parts, strict=True):
            observer.observe(part)
    return tuple(
        o.qparams(quantizer.bits, symmetric=quantizer.config.symmetric, clip=quantizer.config.clip) for o in observers
    )


def _report(block: Block, outcome: Outcome) -> UnitReport:
    return UnitReport(
        block.name,
        block.kind,
        block.layers,
        outcome.before,
        outcome.after,
        outcome.best is not None,
        outcome.iterations,
        outcome.reason,
    )
