"""Weights as integers per output channel, in step with the parameter whatever happens to it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from modiff import ConfigError, LayerConfig, WeightConfig
from modiff.core.observers import MSEObserver
from modiff.core.transforms import Segment
from modiff.nn.weight import QuantizedWeight
from tests.helpers import assert_same_bits, assert_within
from tests.recipes import evaluate, randomised, twin
from tests.reference.hadamard import along, rotation
from tests.reference.quantizer import quantize_weight


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("shape", [(5, 12), (5, 12, 3), (5, 12, 3, 3)])
@pytest.mark.parametrize("segments", [(12,), (4, 8)])
def test_the_dense_weight_equals_the_reference(bits, shape, segments):
    weight = torch.randn(shape, dtype=torch.float64) * torch.logspace(-3, 3, 5).reshape(-1, *[1] * (len(shape) - 1))
    quantized = QuantizedWeight(WeightConfig(bits=bits), segments, None)
    expected = quantize_weight(weight, bits, segments)
    assert_within(quantized.dense(weight, torch.float64), expected, 1e-12 * expected.abs() + 1e-300)
    codes = [codes for codes, _ in quantized.codes(weight)]
    assert [c.shape[1] for c in codes] == list(segments)
    assert all(c.dtype == torch.int8 and c.abs().max() == 2 ** (bits - 1) - 1 for c in codes)
    assert [q.scale.numel() for _, q in quantized.codes(weight)] == [5] * len(segments)


def test_a_rotated_weight_is_rotated_before_it_is_rounded():
    weight = torch.randn(3, 12, 2, dtype=torch.float64)
    turned = along(weight, rotation((12,), 64), 1)
    folded = (Segment(12, 4),)
    for bits in (None, 4):
        dense = QuantizedWeight(WeightConfig(bits=bits), (12,), folded).dense(weight, torch.float64)
        assert_within(dense, quantize_weight(turned, bits), 1e-12)


def test_without_bits_or_rotation_it_is_the_weight_itself():
    weight = torch.randn(4, 3)
    quantized = QuantizedWeight(WeightConfig(bits=None), (3,), None)
    assert_same_bits(quantized.dense(weight, torch.float32), weight)
    assert quantized.codes(weight) == ()


def test_the_mse_search_shrinks_the_range_of_each_output_channel():
    weight = torch.randn(2, 4000)
    weight[:, 0] = torch.tensor([8.0, 4.0])
    ((_, qparams),) = QuantizedWeight(WeightConfig(bits=3, search="mse"), (4000,), None).codes(weight)
    for row in range(2):
        observer = MSEObserver()
        observer.observe(weight[row])
        assert float(qparams.scale[row]) == pytest.approx(float(observer.qparams(3).scale), rel=1e-6)
        assert float(qparams.scale[row]) < 0.9 * float(weight[row].abs().max()) / 3


def changed_in_place(layer: nn.Linear) -> None:
    with torch.no_grad():
        layer.weight.mul_(3.0)


def changed_in_inference_mode(layer: nn.Linear) -> None:
    with torch.inference_mode():
        layer.weight.mul_(3.0)


def replaced(layer: nn.Linear) -> None:
    layer.weight = nn.Parameter(layer.weight.detach() * 3.0)


def loaded(layer: nn.Linear) -> None:
    layer.load_state_dict({k: 3.0 * v for k, v in layer.state_dict().items()})


def to_double(layer: nn.Linear) -> None:
    layer.to(torch.float64)


def data_replaced(layer: nn.Linear) -> None:
    layer.weight.data = layer.weight.data * 3.0


@pytest.mark.parametrize(
    "change", [changed_in_place, changed_in_inference_mode, replaced, loaded, to_double, data_replaced]
)
def test_the_codes_follow_every_change_of_the_parameter(change):
    layer = randomised(nn.Linear(8, 4))
    quantized = QuantizedWeight(WeightConfig(bits=4), (8,), None)
    quantized.dense(layer.weight, torch.float64)
    change(layer)
    assert_within(quantized.dense(layer.weight, torch.float64), quantize_weight(layer.weight.detach(), 4), 1e-6)


def test_the_codes_are_made_once_while_the_weight_stays():
    weight = torch.randn(4, 8)
    quantized = QuantizedWeight(WeightConfig(bits=4), (8,), None)
    first = quantized.codes(weight)
    assert quantized.codes(weight) is first


def test_a_weight_written_through_data_is_seen_by_the_next_trajectory():
    """A LoRA fused with `weight.data += delta` leaves no trace on the tensor: no new memory, no new version."""
    layer = randomised(nn.Linear(8, 4, bias=False))
    modulated = twin(layer, LayerConfig(weight=WeightConfig(bits=8)))
    x = torch.randn(3, 8)
    outputs = []
    for factor in (1.0, 3.0):
        layer.weight.data *= factor
        modulated.clock.start()
        outputs.append(evaluate(modulated, x))
        modulated.clock.stop()
    assert_within(outputs[1], 3 * outputs[0], 1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_damaged_weight_is_refused(value):
    weight = torch.randn(4, 8)
    weight[1, 2] = value
    for bits in (None, 8):
        with pytest.raises(ConfigError, match="weight: expected finite numbers, got NaN or infinity"):
            QuantizedWeight(WeightConfig(bits=bits), (8,), None).dense(weight, torch.float32)
