"""Watching a full-precision network: what is shown, that nothing changes, and what is refused."""

from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import nn

import modiff
from modiff import presets
from modiff.config import LayerConfig
from modiff.errors import CalibrationError, ConfigError, StateError
from modiff.evaluate.analysis.layers import HISTOGRAM_BINS, Distribution
from modiff.evaluate.analysis.watch import Visit, watch
from modiff.hosts.diffusers.runs import calibration_run
from tests.evaluate.analysis.networks import OneLayer, driven, only_layer
from tests.helpers import assert_same_bits, drifting
from tests.hosts.tiny import HOSTS


class Recorder:
    def __init__(self) -> None:
        self.visits: list[Visit] = []

    def see(self, visit: Visit) -> None:
        self.visits.append(visit)


def hooks(module: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules())


def test_every_call_of_every_layer_is_shown_at_every_step_with_its_own_tensors() -> None:
    network, recorder = OneLayer(nn.Linear(6, 6), times=2), Recorder()
    inputs = drifting(0, (2, 6), 3, 0.1, torch.float32)
    report = watch(network, driven(network, inputs), only_layer(LayerConfig()), [recorder])
    assert [e.name for e in report.taken] == ["layer"]
    assert [(v.key, v.step) for v in recorder.visits] == [(("layer", c), s) for s in range(3) for c in range(2)]
    for visit, x in zip(recorder.visits[::2], inputs, strict=True):
        assert_same_bits(visit.input, x)
        assert_same_bits(visit.output, network.layer(x).detach())


def test_a_pipeline_generates_the_same_bits_watched_and_has_its_splits_shown() -> None:
    pipe = HOSTS["ddim"].build()
    run = partial(calibration_run(pipe, steps=3, batch=2), 0)
    plain = torch.as_tensor(run().images)
    watched: list[torch.Tensor] = []
    recorder, before = Recorder(), hooks(pipe.unet)
    watch(pipe, lambda: watched.append(torch.as_tensor(run().images)), presets.w8a4(), [recorder])
    assert_same_bits(watched[0], plain)
    assert hooks(pipe.unet) == before
    splits = {v.entry.name: v.split for v in recorder.visits if v.split}
    assert splits
    assert all(f"split at {v.split}" in v.entry.reason for v in recorder.visits if v.split)


def test_a_modulated_target_several_networks_and_single_steps_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    network, inputs = OneLayer(nn.Linear(6, 6)), drifting(0, (1, 6), 2, 0.1, torch.float32)
    for few in (inputs[:0], inputs[:1]):
        with pytest.raises(CalibrationError, match="got fewer of layer"):
            watch(network, driven(network, few), only_layer(LayerConfig()), [])
    modiff.apply(network, only_layer(LayerConfig()))
    with pytest.raises(StateError, match="with modulated layers"):
        watch(network, lambda: None, only_layer(LayerConfig()), [])
    two = {"unet": network, "prior": network}
    monkeypatch.setattr("modiff.evaluate.analysis.watch.networks_of", lambda target: two)
    with pytest.raises(ConfigError, match=r"expected one network, got \['unet', 'prior'\]"):
        watch(network, lambda: None, only_layer(LayerConfig()), [])


def test_histograms_equal_a_loop_over_all_values() -> None:
    inputs, network = drifting(2, (3, 8), 5, 0.4, torch.float32), OneLayer(nn.Linear(8, 5))
    distribution = Distribution()
    watch(network, driven(network, inputs), only_layer(LayerConfig()), [distribution])
    result = distribution.result()
    for name, earlier in (("activation", 0.0), ("difference", 1.0)):
        counts = [0] * HISTOGRAM_BINS
        for last, x in pairwise(inputs):
            for value in ((x - earlier * last) / x.abs().max()).flatten().tolist():
                counts[min(HISTOGRAM_BINS - 1, max(0, int((value + 1) / 2 * HISTOGRAM_BINS)))] += 1
        assert result[name] == counts
