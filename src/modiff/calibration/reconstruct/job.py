"""One unit after the other: capture its inputs, learn, and fix what is better into the layers."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from modiff.calibration.blocks import Block
from modiff.calibration.data import Call
from modiff.calibration.reconstruct.alignment import weigh_samples
from modiff.calibration.reconstruct.config import ReconstructConfig, UnitReport
from modiff.calibration.reconstruct.layers import Through, Trainee, full_precision, without_states
from modiff.calibration.reconstruct.learn import (
    WITH_WEIGHTS,
    JointLearner,
    Learned,
    Run,
    ScaleLearner,
    WeightLearner,
    learn,
    learned_codes,
    learned_scales,
    reconstruction_loss,
    unit_loss,
)
from modiff.calibration.reconstruct.samples import UnitCall, UnitData, capture, paired
from modiff.core.affine import QParams
from modiff.core.observers import MinMaxObserver
from modiff.core.quantizer import Quantizer
from modiff.model.attach import required_attachment
from modiff.model.attention import attention_quantizers
from modiff.model.calibrate import quantizers_of
from modiff.nn.adapters import modules_of


class ReconstructionJob:
    """The reconstruction of one model; holds the inputs and targets of one unit at a time."""

    def __init__(self, model: nn.Module, calls: Sequence[Call], config: ReconstructConfig) -> None:
        self.model, self.calls, self.config = model, calls, config
        attachment = required_attachment(model, "reconstruct")
        self.originals, self.layers = attachment.originals, attachment.layers
        self.quantizers = quantizers_of(model)

    def learn(self, block: Block, index: int) -> tuple[Learned, UnitReport]:
        """What one unit shall keep, {} for nothing new, and its report; its layers are as before."""
        generator = torch.Generator().manual_seed(self.config.seed + index)
        if block.calls == 0:
            return {}, _left(block, "never ran on the calibration calls")
        if self.config.learn == "residual_scales":
            return self._learn_residual(block, generator)
        unit = modules_of(self.model)[block.name]

        def run(batch: UnitCall) -> Any:
            return unit(*batch.args, **batch.kwargs)

        def exact(batch: UnitCall) -> Any:
            with full_precision(self.model):
                return run(batch)

        calls: list[UnitCall] = []
        for call in self.calls:  # inputs from the model as quantized so far, targets from full precision
            targets = self._captured(block, call, exact=True)
            inputs, both = self._captured(block, call, exact=False), self.config.layer_weight > 0
            calls += paired(inputs, targets, block.name, call.step, both_inputs=both)
        data = self._data(block, calls, exact, generator)
        with without_states(self.model, self.config.activations) as trainees:
            inside = {name: trainees[name] for name in block.layers}
            figures = {}
            if self.config.alignment is not None:
                figures = weigh_samples(data, run, inside, self.config, self.config.alignment)
            learner, objective = self._learner(block, inside), self._objective(block, run, trainees, generator)
            best, report = learn(block, run, data, learner, self.config, generator, objective)
        return best or {}, replace(report, figures=report.figures | figures)

    def _learner(self, block: Block, inside: Mapping[str, Trainee]) -> WeightLearner | ScaleLearner:
        if self.config.learn == "weights":
            return WeightLearner(inside, self.config)
        scales = self._scales(block, inside)
        return scales if self.config.learn == "activation_scales" else JointLearner(inside, scales, self.config)

    def _objective(
        self, block: Block, run: Run, trainees: Mapping[str, Trainee], generator: torch.Generator
    ) -> Callable[[UnitCall], Tensor] | None:
        """The loss of a batch with QDrop, and with the losses of the layers inside (EDA-DM); None for the unit's alone.

        A layer's target is its output in full precision from the unit's input in full precision.
        """
        weight, p, drop = self.config.layer_weight, self.config.p, (self.config.qdrop, generator)
        if weight == 0 and self.config.qdrop == 0:
            return None
        known = modules_of(self.model)
        layers, unit = {name: known[name] for name in block.layers}, known[block.name]

        def outputs(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, list[Tensor]]:
            seen: list[Tensor] = []
            hooks = [m.register_forward_hook(lambda _m, _i, output: seen.append(output)) for m in layers.values()]
            try:
                return unit(*args, **kwargs), seen
            finally:
                for hook in hooks:
                    hook.remove()

        def objective(batch: UnitCall) -> Tensor:
            """The loss of the unit, and of its layers but the last, on one batch."""
            for trainee in trainees.values():
                trainee.drop = drop if self.config.qdrop else None
            try:
                if weight == 0:
                    return unit_loss(run, batch, p)
                whole, seen = outputs(batch.args, batch.kwargs)
            finally:
                for trainee in trainees.values():
                    trainee.drop = None
            with torch.no_grad(), full_precision(self.model):
                targets = outputs(*batch.exact)[1]
            loss = reconstruction_loss(whole, batch.targets, p, batch.weights)
            pairs = list(zip(seen, targets, strict=True))[:-1]
            inner = [reconstruction_loss(output, [target], p, batch.weights) for output, target in pairs]
            return loss + weight * torch.stack(inner).sum() if inner else loss

        return objective

    def _learn_residual(self, block: Block, generator: torch.Generator) -> tuple[Learned, UnitReport]:
        """The static scale of one layer's residual (MoDiff, 1.5): run on the previous input, then on this one.

        ô_t = A(a_{t+1}) + A(code(a_t - a_{t+1})) + bias = A(a_{t+1} + code(a_t - a_{t+1})) + bias, against A in full
        precision; both inputs are those of full precision.
        """
        name = block.layers[0]
        trainee, quantizer = Trainee(self.layers[name], "quantized"), self.quantizers[name]
        calls: list[UnitCall] = []
        for call in self.calls:
            if call.previous is not None:
                before, now = (self._captured(block, c, exact=True) for c in (call.previous, call))
                calls += [UnitCall((b.args[0], n.args[0]), {}, n.targets) for b, n in zip(before, now, strict=True)]

        def residual(batch: UnitCall) -> Tensor:
            before, now = (trainee.prepare(x) for x in batch.args)
            return trainee.operate(before + trainee.code(now - before))

        data = self._data(block, calls, lambda batch: self.originals[name](batch.args[1]), generator)
        starts = {name: quantizer.static or _widest(trainee, quantizer, calls)}
        learner = ScaleLearner({name: trainee}, starts, self.config.learning_rate)
        start = learner.result()
        best, report = learn(block, residual, data, learner, self.config, generator)
        return best or start, report

    def keep(self, learned: Learned) -> None:
        """Fix what a unit learned into its layers."""
        for name in dict.fromkeys(key.rpartition(".")[0].rpartition(".")[0] for key in learned):
            if f"{name}.0.codes" in learned:
                self.layers[name].quantized_weight.fix(learned_codes(learned, name))
            else:
                self.quantizers[name.removeprefix(WITH_WEIGHTS)].static = learned_scales(learned, name)

    def present_tensors(self) -> list[Tensor]:
        """Fixed codes and scales that decide what is learned; codes that are to be learned start from the weights."""
        rounding = self.config.learns_rounding
        fixed = (
            layer.quantized_weight.codes(layer.weight)
            for name, layer in self.layers.items()
            if layer.quantized_weight.fixed and not (rounding and self.config.takes(name))
        )
        tensors = [tensor for runs in fixed for codes, qparams in runs for tensor in (codes, qparams.scale)]
        if not rounding or self.config.activations == "quantized":
            for quantizer in self.quantizers.values():
                tensors += quantizer.state_dict_tensors().values()
        return tensors

    @contextmanager
    def undone_on_error(self) -> Iterator[None]:
        """Start from rounding to nearest where rounding is learned; if the body raises, all is as it was before."""
        weights = {layer.quantized_weight: name for name, layer in self.layers.items()}
        before = [(each, dict(vars(each))) for each in (*weights, *self.quantizers.values())]
        for weight, name in weights.items():
            if self.config.learns_rounding and self.config.takes(name):
                weight.unfix()
        try:
            yield
        except BaseException:
            for each, attributes in before:
                vars(each).update(attributes)
            raise

    def left_out(self, blocks: Sequence[Block]) -> list[UnitReport]:
        """Attention whose scales were to be learned and lie in no unit: they stay as measured."""
        if self.config.learn not in ("activation_scales", "weights_and_scales"):
            return []
        modules = dict.fromkeys(name.rpartition(".")[0] for name in self.quantizers if name not in self.layers)
        outside = [name for name in modules if not any(f"{name}.".startswith(f"{b.name}.") for b in blocks)]
        reason = "lies in no block: the scales of its products stay as measured"
        return [_left(Block(name, "attention", ()), reason) for name in outside]

    def _captured(self, block: Block, call: Call, *, exact: bool) -> list[UnitCall]:
        how = full_precision(self.model) if exact else without_states(self.model, self.config.activations)
        return capture(self.model, block.name, call, block.calls, how)

    def _data(self, block: Block, calls: Sequence[UnitCall], run: Run, generator: torch.Generator) -> UnitData:
        device, held_out = self.layers[block.layers[0]].weight.device, self.config.held_out
        return UnitData(calls, run, device=device, held_out=held_out, generator=generator, name=block.name)

    def _scales(self, block: Block, trainees: Mapping[str, Trainee]) -> ScaleLearner:
        inside = f"{block.name}."
        holders: dict[str, Trainee | Through] = dict(trainees)
        for name, through in attention_quantizers(self.model).items():
            if isinstance(through, Through) and name.startswith(inside) and self.config.takes(name):
                holders[name] = through
        starts = {name: start for name in holders if (start := self.quantizers[name].static) is not None}
        rate = self.config.learning_rate if self.config.learn == "activation_scales" else self.config.scale_rate
        return ScaleLearner({name: holders[name] for name in starts}, starts, rate)


def _left(block: Block, reason: str) -> UnitReport:
    return UnitReport(block.name, block.kind, block.layers, 0.0, 0.0, False, 0, reason)


def _widest(trainee: Trainee, quantizer: Quantizer, calls: Sequence[UnitCall]) -> tuple[QParams, ...]:
    quantizer.watch(lambda: MinMaxObserver(quantizer.observed_dim))
    for call in calls:
        before, now = (trainee.prepare(x.to(trainee.quantized.weight.device)) for x in call.args)
        quantizer(now - before)
    quantizer.freeze()
    starts, quantizer.static = quantizer.static or (), None
    return starts
