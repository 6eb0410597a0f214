"""PTQ4DM: its ranges are those of a search in float64 on the states it says, and the model comes back."""

import dataclasses

import pytest
import torch
from torch import Tensor

import modiff
from modiff import ModulationConfig, NormalSteps
from modiff.core.observers import Observer
from modiff.hosts.diffusers.runs import calibration_run
from modiff.methods import Ptq4dmConfig, quantize
from modiff.model.calibrate import quantizers_of
from tests.methods import small

STEPS = 5
SMALL = Ptq4dmConfig(samples=4, batch=4, steps=STEPS, trials=12)


class Keeper(Observer):
    """Keeps all it is shown."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def observe(self, x: Tensor) -> None:
        super().observe(x)
        self.seen.append(x.detach().flatten().double())


def inputs_of(model, calls) -> dict[str, list[Keeper]]:
    """What each quantizer is given while the set is replayed as calibration does, by runs of channels."""
    keepers: dict[str, list[Keeper]] = {}

    def keeper(name: str) -> Keeper:
        keepers.setdefault(name, []).append(Keeper())
        return keepers[name][-1]

    for name, quantizer in quantizers_of(model).items():
        quantizer.watch(lambda name=name: keeper(name))
    modiff.replay(model, calls)
    for quantizer in quantizers_of(model).values():
        quantizer.unwatch()
    return keepers


def loss(values: Tensor, low: float, high: float, bits: int) -> float:
    """mean |x - Q(x)|^2.4 of an asymmetric quantizer, in float64."""
    top = 2**bits - 1
    scale = (high - low) / top
    zero = round(-low / scale)
    return float((values - scale * ((values / scale).round() + zero).clamp(0, top).sub(zero)).abs().pow(2.4).mean())


def test_every_range_is_that_of_a_brute_force_search_in_float64_over_the_ndtc_states():
    pipe, trials = small.build(), 40
    run = calibration_run(pipe, steps=STEPS, batch=4, seed=0)
    calls = modiff.collect(pipe, run, batch=4, steps=STEPS, sampler=NormalSteps(mean=SMALL.mean), progress=False)
    assert sum(len(c.args[0]) for c in calls) == SMALL.samples
    quantize(pipe, dataclasses.replace(SMALL, activation_bits=4, trials=trials), progress=False)
    shrunk, quantizers = 0, quantizers_of(pipe.unet)
    for name, keepers in inputs_of(pipe.unet, calls).items():
        bits = quantizers[name].bits
        for keeper, qparams in zip(keepers, quantizers[name].static, strict=True):
            values, scale = torch.cat(keeper.seen), float(qparams.scale)
            low, high = min(float(values.min()), 0.0), max(float(values.max()), 0.0)
            losses = {r: loss(values, low * r, high * r, bits) for r in (1 - 0.01 * i for i in range(trials))}
            mine = min(losses, key=lambda r: abs((high - low) * r / (2**bits - 1) - scale))
            assert scale == pytest.approx((high - low) * mine / (2**bits - 1), rel=1e-5), name
            assert losses[mine] <= min(losses.values()) * (1 + 1e-4), name
            shrunk += mine < 1
    assert shrunk > 5, "where no range is cut, the search is not tested"


def test_first_and_last_layers_have_8_bits_at_any_bit_width():
    pipe = small.build()
    report = quantize(pipe, dataclasses.replace(SMALL, weight_bits=4, activation_bits=6), progress=False)
    settings = {e.name: e.setting for e in report.taken}
    assert settings.pop("conv_in") == settings.pop("conv_out") == "W8A8 plain"
    assert set(settings.values()) == {"W4A6 plain"}


def test_with_modulation_the_ranges_are_those_of_residuals():
    scales = []
    for modulation in (None, ModulationConfig()):
        pipe = small.build()
        quantize(pipe, dataclasses.replace(SMALL, steps=12, modulation=modulation), progress=False)
        scales.append(float(quantizers_of(pipe.unet)["conv_in"].static[0].scale))
    assert scales[1] < 0.5 * scales[0]
