"""Weights as integers per output channel, in step with the parameter whatever happens to it."""

from __future__ import annotations

import copy
from unittest.mock import Mock

import pytest
import torch
from torch import nn

from modiff import ConfigError, LayerConfig, ModulationConfig, StateError, WeightConfig
from modiff.core.affine import QParams, quantize
from modiff.core.hadamard import Segment
from modiff.core.observers import MSEObserver
from modiff.kernels import native
from modiff.nn.weight import QuantizedWeight
from tests.helpers import assert_same_bits, assert_within
from tests.recipes import evaluate, quantized, randomised
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


@pytest.mark.parametrize("channels", [256, 512, 1280])
def test_the_mse_search_looks_at_every_tap_of_a_large_kernel(channels):
    weight = torch.randn(channels, 130, 3, 3) * 0.1
    weight[:, :, 1, 1] *= 6  # as trained kernels: the centre weighs most
    errors = {}
    for search in ("mse", "minmax"):
        dense = QuantizedWeight(WeightConfig(bits=8, search=search), (130,), None).dense(weight, torch.float32)
        errors[search] = (dense - weight).square().mean().item()
    assert errors["mse"] <= errors["minmax"]


@pytest.mark.parametrize("fixed", [False, True])
def test_a_weight_that_did_not_change_keeps_its_codes(monkeypatch, fixed):
    weight, quantized = torch.randn(4, 12, 3), QuantizedWeight(WeightConfig(bits=4), (4, 8), None)
    if fixed:
        quantized.fix(quantized.codes(weight))
    before = quantized.codes(weight)
    known = native.load("fingerprint").library is not None
    for same in (weight, weight.clone()):
        quantized.forget()
        assert (quantized.codes(same) is before) == known
    monkeypatch.setattr("modiff.nn.weight.fingerprint", lambda _: None)
    quantized.forget()
    again = quantized.codes(weight)
    assert again is not before
    assert all(torch.equal(a[0], b[0]) for a, b in zip(again, before, strict=True))
    weight.data.neg_()
    quantized.forget()
    if fixed:
        with pytest.raises(StateError, match="another one"):
            quantized.codes(weight)
    else:
        assert not torch.equal(quantized.codes(weight)[0][0], before[0][0])


def test_codes_that_are_given_or_taken_back_count_for_an_unchanged_weight():
    weight, quantized = torch.randn(4, 12), QuantizedWeight(WeightConfig(bits=4), (12,), None)
    ((codes, qparams),) = quantized.codes(weight)
    down = torch.where(codes == 7, codes, codes + ((weight / qparams.scale) > codes).to(torch.int8))
    quantized.fix(((down, qparams),))
    assert torch.equal(quantized.codes(weight)[0][0], down)
    assert not torch.equal(down, codes)
    quantized.unfix()
    assert torch.equal(quantized.codes(weight)[0][0], codes)


def test_a_weight_that_was_refused_is_refused_again():
    weight, quantized = torch.randn(4, 12), QuantizedWeight(WeightConfig(bits=4), (12,), None)
    quantized.fix(quantized.codes(weight))
    quantized.codes(weight)
    weight.data.neg_()
    for _ in range(2):
        quantized.forget()
        with pytest.raises(StateError, match="another one"):
            quantized.codes(weight)


def test_a_weight_that_comes_back_after_its_codes_could_not_be_made_has_them_again(monkeypatch):
    weight, quantized = torch.randn(4, 12), QuantizedWeight(WeightConfig(bits=4), (12,), None)
    ((before, _),) = quantized.codes(weight)
    weight.data.neg_()
    quantized.forget()
    with monkeypatch.context() as patch:
        patch.setattr(quantized, "_quantize", Mock(side_effect=MemoryError))
        with pytest.raises(MemoryError):
            quantized.codes(weight)
    weight.data.neg_()
    quantized.forget()
    ((after, _),) = quantized.codes(weight)
    assert torch.equal(after, before)


def test_a_weight_that_moves_in_memory_is_read_where_it_is():
    weight = torch.randn(4, 3)  # blocks of one channel: the rotated weight is the weight
    quantized = QuantizedWeight(WeightConfig(bits=None), (3,), (Segment(3, 1),))
    assert_same_bits(quantized.dense(weight, torch.float32), weight)
    moved = weight.clone()
    weight.zero_()
    assert_same_bits(quantized.dense(moved, torch.float32), moved)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_mse_search_is_made_again_only_for_other_values(monkeypatch, dtype):
    seen: list[torch.Tensor] = []
    monkeypatch.setattr(MSEObserver, "observe", lambda self, x, of=MSEObserver.observe: (seen.append(x), of(self, x)))
    weight = torch.randn(4, 12, 3, dtype=dtype)
    quantized = QuantizedWeight(WeightConfig(bits=4, search="mse"), (4, 8), None)
    before = quantized.dense(weight, dtype).clone()
    quantized.forget()
    assert_same_bits(quantized.dense(weight, dtype), before)
    assert len(seen) == 2
    weight.data[2, 5, 1] += 0.5
    quantized.forget()
    changed = quantized.dense(weight, dtype)
    assert [tuple(x.shape) for x in seen] == [(4, 4, 3), (4, 8, 3), (4, 8, 3)]
    assert_same_bits(changed, QuantizedWeight(WeightConfig(bits=4, search="mse"), (4, 8), None).dense(weight, dtype))


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
    modulated = quantized(layer, LayerConfig(weight=WeightConfig(bits=8)))
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


# ------------------------------------------------------------------------------------------------- learned codes

CASES = [((12,), None), ((4, 8), None), ((12,), (Segment(12, 4),)), ((4, 8), (Segment(4, 4), Segment(8, 8)))]


def learned(
    quantized: QuantizedWeight, weight: torch.Tensor, seed: int = 0
) -> tuple[tuple[torch.Tensor, QParams], ...]:
    """As AdaRound gives them: each value rounded down or up at random."""
    generator = torch.Generator().manual_seed(seed)
    floats = quantized.floats(weight).split(list(quantized.segments), 1)
    bits = quantized.config.bits
    parts = []
    for (_, qparams), values in zip(quantized.codes(weight), floats, strict=True):
        up = torch.rand(values.shape, generator=generator) < 0.5
        codes = (torch.floor(values / qparams.scale) + up).clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        parts.append((codes.to(torch.int8), qparams))
    return tuple(parts)


def fixed(
    bits: int = 4, case: int = 0
) -> tuple[QuantizedWeight, torch.Tensor, tuple[tuple[torch.Tensor, QParams], ...]]:
    weight = torch.randn(6, 12, 3, generator=torch.Generator().manual_seed(1))
    quantized = QuantizedWeight(WeightConfig(bits=bits), *CASES[case])
    parts = learned(quantized, weight)
    quantized.fix(parts)
    return quantized, weight, parts


@pytest.mark.parametrize("case", range(len(CASES)))
def test_floats_are_the_rotated_values_that_rounding_starts_from(case):
    segments, folded = CASES[case]
    weight = torch.randn(6, 12, 3).half()
    quantized = QuantizedWeight(WeightConfig(bits=5), segments, folded)
    floats = quantized.floats(weight)
    expected = weight.double()
    if folded is not None:
        runs = zip(weight.double().split([s.channels for s in folded], 1), folded, strict=True)
        expected = torch.cat([along(part, rotation((s.channels,), s.block), 1) for part, s in runs], 1)
    assert floats.dtype == torch.float32
    assert_within(floats, expected, 1e-6)
    for (codes, qparams), part in zip(quantized.codes(weight), floats.split(list(segments), 1), strict=True):
        assert_same_bits(codes, quantize(part, qparams, 5))
    assert quantized.floats(weight.double()).dtype == torch.float64


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("case", range(len(CASES)))
def test_fixed_codes_are_the_weight_and_unfix_rounds_again(bits, case):
    quantized, weight, parts = fixed(bits, case)
    rounded = QuantizedWeight(quantized.config, quantized.segments, quantized.rotation)
    assert quantized.fixed
    expected = torch.cat([codes.double() * qparams.scale.double() for codes, qparams in parts], 1)
    assert_within(quantized.dense(weight, torch.float64), expected, 1e-12)
    for (codes, qparams), (theirs, scale) in zip(quantized.codes(weight), parts, strict=True):
        assert_same_bits(codes, theirs)
        assert_same_bits(qparams.scale, scale.scale)
    assert (quantized.dense(weight, torch.float32) != rounded.dense(weight, torch.float32)).any()
    quantized.unfix()
    assert not quantized.fixed
    assert_same_bits(quantized.dense(weight, torch.float32), rounded.dense(weight, torch.float32))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("case", range(len(CASES)))
def test_fixed_codes_survive_a_change_of_dtype_and_the_way_back(dtype, bits, case):
    quantized, weight, parts = fixed(bits, case)
    for passed in (weight.to(dtype), weight.to(dtype).float()):
        quantized.forget()
        for (codes, qparams), (theirs, scale) in zip(quantized.codes(passed), parts, strict=True):
            assert_same_bits(codes, theirs)
            assert_same_bits(qparams.scale, scale.scale)


def test_tiny_weights_survive_float16():
    """Below 6e-5 float16 loses relative precision: at 1e-6, 8-bit scales are smaller than its rounding."""
    weight = 1e-6 * torch.randn(6, 12, generator=torch.Generator().manual_seed(1))
    for folded in (None, (Segment(12, 4),)):
        quantized = QuantizedWeight(WeightConfig(bits=8), (12,), folded)
        parts = learned(quantized, weight)
        quantized.fix(parts)
        assert_same_bits(quantized.codes(weight.half())[0][0], parts[0][0])


@pytest.mark.parametrize("case", range(len(CASES)))
def test_a_weight_that_changed_after_its_rounding_was_learned_is_refused(case):
    quantized, weight, _ = fixed(4, case)
    scale = float(max(q.scale.max() for _, q in quantized.codes(weight)))
    weight.data[2] += 2.5 * scale
    quantized.codes(weight)  # written through .data: unseen until the next trajectory
    quantized.forget()
    with pytest.raises(StateError, match=r"weight: .*the weight changed after its rounding was learned"):
        quantized.codes(weight)
    with pytest.raises(StateError, match=r"call modiff\.reconstruct again"):
        quantized.dense(torch.randn(3, 12, 3), torch.float32)
    quantized.unfix()
    quantized.codes(weight)


@pytest.mark.parametrize("sign", [-1, 1])
def test_a_saturated_code_may_lie_far_below_its_weight_but_not_above(sign):
    quantized = QuantizedWeight(WeightConfig(bits=4), (4,), None)
    codes = sign * torch.tensor([[7, 1, 2, 3]], dtype=torch.int8)
    quantized.fix(((codes, QParams(torch.ones(1, 1), None)),))
    quantized.codes(sign * torch.tensor([[40.0, 1.4, 1.1, 3.9]]))
    quantized.forget()
    with pytest.raises(StateError, match="the weight changed"):
        quantized.codes(sign * torch.tensor([[4.0, 1.4, 1.1, 3.9]]))


def test_fixed_codes_serve_a_layer_over_many_trajectories_and_copies():
    layer = randomised(nn.Linear(8, 4, bias=False))
    modulated = quantized(
        layer,
        LayerConfig(weight=WeightConfig(bits=3), modulation=ModulationConfig(anchor_weights="quantized")),
        name="up",
    )
    parts = learned(modulated.quantized_weight, layer.weight)
    modulated.quantized_weight.fix(parts)
    x = torch.randn(3, 8)
    for copied in (modulated, copy.deepcopy(modulated)):
        for _ in range(2):
            modulated.clock.start()
            copied.clock.active = True
            copied.loop.forget()
            expected = x.double() @ (parts[0][0].double() * parts[0][1].scale.double()).T
            assert_within(evaluate(copied, x), expected, 1e-5)
            modulated.clock.stop()
    layer.weight.data *= 3
    modulated.clock.start()
    with pytest.raises(StateError, match=r"up.weight: expected the weight whose codes were fixed"):
        evaluate(modulated, x)


CODES, SCALE = torch.ones(6, 12, 3, dtype=torch.int8), torch.ones(6, 1, 1)


@pytest.mark.parametrize(
    ("parts", "got"),
    [
        ((), r"shapes \[\]"),
        (((CODES[:, :4], QParams(SCALE, None)),), r"shapes \[\(6, 4, 3\)\]"),
        (((CODES, QParams(SCALE, None)),) * 2, "shapes"),
        (((CODES.int(), QParams(SCALE, None)),), "torch.int32 outside -8..7"),
        (((CODES * 8, QParams(SCALE, None)),), "torch.int8 outside -8..7"),
        (((CODES * -9, QParams(SCALE, None)),), "torch.int8 outside -8..7"),
        (((CODES, QParams(SCALE.flatten(), None)),), r"scales of shape \(6,\)"),
        (((CODES, QParams(SCALE, torch.zeros(6, 1, 1, dtype=torch.int32))),), ".*with zero points"),
        (((CODES, QParams(-SCALE, None)),), "scales that are not positive numbers"),
        (((CODES, QParams(SCALE * float("nan"), None)),), "scales that are not positive numbers"),
        (((CODES, QParams(SCALE.int(), None)),), "scales that are not positive numbers"),
    ],
)
def test_what_is_no_code_for_the_layer_is_refused_and_changes_nothing(parts, got):
    quantized, weight, before = fixed()
    with pytest.raises(ConfigError, match=f"weight: expected codes for 1 segments at 4 bits, got {got}"):
        quantized.fix(parts)
    assert_same_bits(quantized.codes(weight)[0][0], before[0][0])


def test_a_weight_that_keeps_its_floats_has_no_codes_to_fix():
    with pytest.raises(ConfigError, match="got codes for a layer whose weight keeps its floats"):
        QuantizedWeight(WeightConfig(bits=None), (12,), None).fix(((CODES, QParams(SCALE, None)),))
