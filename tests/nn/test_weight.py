"""The quantized weight: equal to the reference, never stale, read when needed; and learned codes that replace it."""

import copy
import pickle
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from modiff import ConfigError, LayerConfig, ModulationConfig, QuantizerConfig, StateError, WeightConfig
from modiff.core.affine import QParams
from modiff.core.hadamard import RotatedRun
from modiff.kernels import native
from modiff.nn.weight import QuantizedWeight, WeightCodes
from tests.helpers import assert_same_bits, assert_same_tensors, assert_within, drifting, relative_error
from tests.nn.building import INT16, integer, same_bits, walk
from tests.recipes import evaluate, play, quantized, randomised, state_of
from tests.reference.hadamard import along, rotation
from tests.reference.quantizer import quantize_weight

W4 = WeightConfig(bits=4)


def same_codes(ours: tuple[WeightCodes, ...], theirs: tuple[WeightCodes, ...]) -> None:
    for (codes, qparams), (expected, scale) in zip(ours, theirs, strict=True):
        assert_same_bits(codes, expected)
        assert_same_bits(qparams.scale, scale.scale)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("shape", [(5, 12), (5, 12, 3), (5, 12, 3, 3)])
@pytest.mark.parametrize("columns", [(12,), (4, 8)])
def test_the_dense_weight_equals_the_reference(bits, shape, columns):
    weight = torch.randn(shape, dtype=torch.float64) * torch.logspace(-3, 3, 5).reshape(-1, *[1] * (len(shape) - 1))
    ours = QuantizedWeight(WeightConfig(bits=bits), columns, None)
    expected = quantize_weight(weight, bits, columns)
    assert_within(ours.dense(weight, torch.float64), expected, 1e-12 * expected.abs() + 1e-300)
    codes = [codes for codes, _ in ours.codes(weight)]
    assert [c.shape[1] for c in codes] == list(columns)
    assert all(c.dtype == torch.int8 and c.abs().max() == 2 ** (bits - 1) - 1 for c in codes)


CASES = [((12,), None), ((4, 8), None), ((12,), (RotatedRun(12, 4),)), ((4, 8), (RotatedRun(4, 4), RotatedRun(8, 8)))]
each_case = pytest.mark.parametrize("case", range(len(CASES)))


@pytest.mark.parametrize("bits", [None, 5])
@each_case
def test_a_weight_is_rotated_in_float32_at_least_before_it_is_rounded(bits, case):
    columns, folded = CASES[case]
    ours, weight = QuantizedWeight(WeightConfig(bits=bits), columns, folded), torch.randn(6, 12, 3).half()
    turned = weight.double()
    if folded is not None:
        runs = zip(turned.split([s.channels for s in folded], 1), folded, strict=True)
        turned = torch.cat([along(run, rotation((s.channels,), s.block), 1) for run, s in runs], 1)
    assert ours.floats(weight).dtype == torch.float32
    assert_within(ours.floats(weight), turned, 1e-6)
    expected = quantize_weight(ours.floats(weight).double(), bits, columns if len(columns) > 1 else ())
    assert_within(ours.dense(weight, torch.float64), expected, 1e-6)
    assert_within(ours.dense(weight.double(), torch.float64), quantize_weight(turned, bits, columns), 1e-12)


@pytest.mark.parametrize("folded", [None, (RotatedRun(3, 1),)])
def test_without_bits_it_is_the_weight_itself_wherever_that_is_in_memory(folded):
    """Blocks of one channel: the rotated weight is the weight."""
    weight, ours = torch.randn(4, 3), QuantizedWeight(WeightConfig(bits=None), (3,), folded)
    assert_same_bits(ours.dense(weight, torch.float32), weight)
    assert ours.codes(weight) == ()
    moved = weight.clone()
    weight.zero_()
    assert_same_bits(ours.dense(moved, torch.float32), moved)


def test_the_mse_search_shrinks_ranges_and_looks_at_every_tap_of_a_large_kernel():
    weight = torch.randn(512, 130, 3, 3) * 0.1
    weight[:, :, 1, 1] *= 6  # as trained kernels: the centre weighs most
    weights = [QuantizedWeight(WeightConfig(bits=8, search=search), (130,), None) for search in ("mse", "minmax")]
    searched, largest = ((each.dense(weight, torch.float32) - weight).square().mean() for each in weights)
    assert searched < largest


# ------------------------------------------------------------------------------------------- changes of the parameter


def in_place(layer: nn.Linear, inference: bool = False) -> None:
    with torch.inference_mode(inference), torch.no_grad():
        layer.weight.mul_(3.0)


CHANGES = {
    "in place": in_place,
    "in inference mode": lambda layer: in_place(layer, True),
    "replaced": lambda layer: setattr(layer, "weight", nn.Parameter(layer.weight.detach() * 3.0)),
    "loaded": lambda layer: layer.load_state_dict({k: 3.0 * v for k, v in layer.state_dict().items()}),
    "to double": lambda layer: layer.to(torch.float64),
    "data replaced": lambda layer: setattr(layer.weight, "data", layer.weight.data * 3.0),
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_codes_follow_every_change_of_the_parameter(change):
    layer, ours = randomised(nn.Linear(8, 4)), QuantizedWeight(W4, (8,), None)
    ours.dense(layer.weight, torch.float64)
    CHANGES[change](layer)
    assert_within(ours.dense(layer.weight, torch.float64), quantize_weight(layer.weight.detach(), 4), 1e-6)


@pytest.mark.parametrize("fixed", [False, True])
def test_a_weight_that_did_not_change_keeps_its_codes(monkeypatch, fixed):
    weight, ours = torch.randn(4, 12, 3), QuantizedWeight(W4, (4, 8), None)
    if fixed:
        ours.fix(ours.codes(weight))
    before = ours.codes(weight)
    assert ours.codes(weight) is before
    known = native.load_library("fingerprint").library is not None
    for same in (weight, weight.clone()):
        ours.forget()
        assert (ours.codes(same) is before) == known
    monkeypatch.setattr("modiff.nn.weight.fingerprint", lambda _: None)
    ours.forget()
    again = ours.codes(weight)
    assert again is not before
    same_codes(again, before)
    weight.data.neg_()
    ours.forget()
    if fixed:
        with pytest.raises(StateError, match="another one"):
            ours.codes(weight)
    else:
        same_codes(ours.codes(weight), QuantizedWeight(W4, (4, 8), None).codes(weight))


def test_a_weight_that_comes_back_after_its_codes_could_not_be_made_has_them_again(monkeypatch):
    weight, ours = torch.randn(4, 12), QuantizedWeight(W4, (12,), None)
    before = ours.codes(weight)
    weight.data.neg_()
    ours.forget()
    with monkeypatch.context() as patch:
        patch.setattr("modiff.nn.weight._rounded", Mock(side_effect=MemoryError))
        with pytest.raises(MemoryError):
            ours.codes(weight)
    weight.data.neg_()
    ours.forget()
    same_codes(ours.codes(weight), before)


# ------------------------------------------------------------------------------------------------- learned codes


def learned(ours: QuantizedWeight, weight: Tensor) -> tuple[WeightCodes, ...]:
    """As AdaRound gives them: each value rounded down or up at random."""
    generator, bits = torch.Generator().manual_seed(0), ours.config.bits
    pairs = []
    for (_, qparams), values in zip(ours.codes(weight), ours.floats(weight).split(ours.columns, 1), strict=True):
        up = torch.rand(values.shape, generator=generator) < 0.5
        codes = (torch.floor(values / qparams.scale) + up).clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        pairs.append((codes.to(torch.int8), qparams))
    return tuple(pairs)


def fixed(bits: int = 4, case: int = 0, size: float = 1.0) -> tuple[QuantizedWeight, Tensor, tuple[WeightCodes, ...]]:
    weight = size * torch.randn(6, 12, 3, generator=torch.Generator().manual_seed(1))
    ours = QuantizedWeight(WeightConfig(bits=bits), *CASES[case])
    codes = learned(ours, weight)
    ours.fix(codes)
    return ours, weight, codes


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("size", [1.0, 1e-6])
@each_case
def test_fixed_codes_survive_a_change_of_dtype_and_the_way_back(dtype, bits, size, case):
    """Below 6e-5 float16 loses relative precision: at 1e-6, 8-bit scales are smaller than its rounding."""
    ours, weight, codes = fixed(bits, case, size)
    for passed in (weight.to(dtype), weight.to(dtype).float()):
        ours.forget()
        same_codes(ours.codes(passed), codes)


@pytest.mark.parametrize("sign", [-1, 1])
def test_a_saturated_code_may_lie_far_below_its_weight_but_not_above(sign):
    ours = QuantizedWeight(W4, (4,), None)
    ours.fix(((sign * torch.tensor([[7, 1, 2, 3]], dtype=torch.int8), QParams(torch.ones(1, 1), None)),))
    ours.codes(sign * torch.tensor([[40.0, 1.4, 1.1, 3.9]]))
    ours.forget()
    with pytest.raises(StateError, match="the weight changed"):
        ours.codes(sign * torch.tensor([[4.0, 1.4, 1.1, 3.9]]))


CODES, SCALE = torch.ones(6, 12, 3, dtype=torch.int8), torch.ones(6, 1, 1)


@pytest.mark.parametrize("codes", [
    (),
    ((CODES[:, :4], QParams(SCALE, None)),),
    ((CODES.int(), QParams(SCALE, None)),),
    ((CODES * 8, QParams(SCALE, None)),),
    ((CODES, QParams(SCALE, torch.zeros(6, 1, 1, dtype=torch.int32))),),
    ((CODES, QParams(SCALE * float("nan"), None)),),
    ((CODES, QParams(-SCALE, None)),),
])  # fmt: skip
def test_what_is_no_code_for_the_layer_is_refused_and_changes_nothing(codes):
    ours, weight, before = fixed()
    with pytest.raises(ConfigError, match=r"weight: expected 4-bit codes for \(12,\) columns .*, got \["):
        ours.fix(codes)
    same_codes(ours.codes(weight), before)
    with pytest.raises(ConfigError, match="weight: expected None-bit codes"):
        QuantizedWeight(WeightConfig(bits=None), (12,), None).fix(before)


# ---------------------------------------------------------------------------------------------------------- packed

LAYERS = {
    "linear": (lambda: nn.Linear(12, 5), (3, 12), None),
    "odd": (lambda: nn.Linear(7, 4, bias=False), (3, 7), None),
    "conv": (lambda: nn.Conv2d(6, 5, 3, padding=1), (2, 6, 4, 4), None),
    "groups": (lambda: nn.Conv1d(6, 4, 3, groups=2), (2, 6, 5), None),
    "split": (lambda: nn.Conv2d(12, 5, 1), (2, 12, 3, 3), 4),
}


def layer_of(kind: str, bits: int | None, anchor: str = "quantized", search: str = "minmax", **settings):
    make, shape, split = LAYERS[kind]
    weight, modulation = WeightConfig(bits=bits, search=search), ModulationConfig(anchor_weights=anchor)
    config = LayerConfig(weight=weight, activation=QuantizerConfig(bits=6), modulation=modulation, **settings)
    return quantized(randomised(make()), config, split=split, name="up"), drifting(0, shape, 4, 0.2, torch.float32)


@pytest.mark.parametrize("rotation", ["none", "hadamard"])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("kind", LAYERS)
def test_a_packed_layer_computes_the_same_bits(kind, bits, rotation):
    layer, inputs = layer_of(kind, bits, search="mse", rotation=rotation)
    codes, before, stored = layer.quantized_weight.codes(layer.weight), play(layer, inputs), layer.packed_state()
    layer.pack()
    assert layer.packed
    for (ours, q), (theirs, expected) in zip(layer.quantized_weight.codes(layer.weight), codes, strict=True):
        same_bits([(ours, q.scale)], [(theirs, expected.scale)])
    same_bits(play(layer, inputs), before)
    layer.pack()
    same_bits([layer.packed_state().values()], [stored.values()])


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("strict", [True, False])
def test_float_weights_are_not_cast_into_a_packed_layer_nor_codes_into_a_float_one(bits, strict):
    """torch would copy 0.3 into an int8 weight as 0."""
    floats, packed = layer_of("conv", bits)[0], layer_of("conv", bits)[0]
    packed.pack()
    for layer, state in ((packed, floats.state_dict()), (floats, packed.state_dict())):
        before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
        with pytest.raises(RuntimeError, match=r"weight: expected torch\..*, got torch\..*modiff\.load"):
            layer.load_state_dict(state, strict=strict)
        assert_same_tensors(layer.state_dict(), before)
    packed.load_state_dict(packed.state_dict())


# ----------------------------------------------------------------------------------------------------- anchor codes


@pytest.mark.parametrize("rotation", ["none", "hadamard"])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("kind", LAYERS)
def test_anchor_codes_are_the_rounding_error_to_half_a_scale(kind, bits, rotation):
    layer, _ = layer_of(kind, bits, "exact", "mse", rotation=rotation)
    exact = layer.quantized_weight.floats(layer.weight).double()
    layer.pack("int8")
    weight, scales = layer.quantized_weight, layer.weight_error_scale.double().unbind(1)
    error = exact - weight.exact(layer.weight, torch.float64)
    for columns, scale in zip(error.split(weight.columns, 1), scales, strict=True):
        assert_within(columns, torch.zeros_like(columns), scale.reshape(-1, *[1] * (columns.dim() - 1)) / 2 + 1e-7)
    assert float(error.norm()) < 0.02 * float((exact - weight.dense(layer.weight, torch.float64)).norm())


# ------------------------------------------------------------------------------------------------ read by somebody else


@pytest.mark.parametrize("rotation", ["none", "hadamard"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", LAYERS)
def test_a_packed_weight_is_read_as_the_floats_that_its_codes_stand_for(kind, bits, rotation):
    layer, (x, *_) = layer_of(kind, bits, rotation=rotation)
    floats = layer.weight.detach()
    layer.pack()
    assert (layer.weight.shape, layer.weight.dtype) == (floats.shape, torch.float32)
    assert 0 < relative_error(layer.weight, floats) < (0.2 if bits == 4 else 0.02)
    convolve = nn.functional.linear if kind in ("linear", "odd") else layer._conv_forward
    layer.clock.start()
    assert_within(convolve(x, layer.weight, layer.bias), evaluate(layer, x), 1e-5)
    assert_same_bits(torch.empty_like(floats).copy_(layer.weight), layer.weight * 1)
    assert layer.half().weight.dtype == torch.float16


@pytest.mark.parametrize("read", [
    lambda w: w.requires_grad_(False),
    lambda w: [setattr(w, "requires_grad", True), setattr(w, "grad", None), w.is_leaf][2],
    lambda w: w.share_memory_().is_contiguous(),
    lambda w: [int(w[0, 0] * 9), float(w[0, 0]), w.data_ptr() > 0, bool(w[0, 0] < 9), len(w), w.shape],
    lambda w: float(w.detach().numpy().sum()),
    lambda w: torch.stack([*w]) + torch.stack(w.unbind(0)),
    lambda w: (isinstance(w.to(w.dtype), nn.Parameter), isinstance(w.half(), nn.Parameter)),
    lambda w: w.max(1).values + w.split(3, 1)[1].sum(),
    copy.deepcopy,
    nn.Parameter,
    lambda w: nn.Parameter(w.data, requires_grad=False).T.contiguous(),
    lambda w: nn.functional.linear(input=torch.ones(1, 12), weight=w),
    lambda w: pickle.loads(pickle.dumps(w)),
    lambda w: torch.func.vmap(torch.sum)(w),
    lambda w: torch.compile(lambda x: 2 * x, backend="eager", fullgraph=True)(w),
])  # fmt: skip
@pytest.mark.parametrize("inference", [False, True])
def test_a_packed_weight_is_read_as_a_parameter_is(read, inference):
    layer, _ = layer_of("linear", 4)
    layer.pack()
    plain = nn.Parameter(layer.weight * 1, requires_grad=False)
    with torch.inference_mode(inference):
        value, expected = read(layer.weight), read(plain)
    if isinstance(expected, Tensor):
        assert_same_bits(value.detach(), expected.detach())
        assert isinstance(value, nn.Parameter) == isinstance(expected, nn.Parameter)
    else:
        assert value == expected


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", LAYERS)
def test_a_layer_takes_its_own_weight_back(kind, packed):
    """PEFT does so where it takes an adapter off."""
    layer, inputs = layer_of(kind, 4)
    if packed:
        layer.pack()
    before = play(layer, inputs)
    for value in (layer.weight, nn.Parameter(layer.weight.detach(), requires_grad=False)):
        layer.weight, layer.bias = value, layer.bias
        layer.weight.data = layer.weight
    assert layer.packed == packed
    same_bits(play(layer, inputs), before)


@pytest.mark.parametrize("use", [
    lambda layer: layer.weight.add_(1),
    lambda layer: layer.weight.split(2)[1].zero_(),
    lambda layer: torch.add(layer.weight, 1, out=layer.weight),
    lambda layer: torch._foreach_add_([layer.weight], 1),
    lambda layer: nn.functional.relu(layer.weight, inplace=True),
    lambda layer: nn.Parameter(layer.weight, requires_grad=False).zero_(),
    lambda layer: setattr(layer, "weight", None),
    lambda layer: setattr(layer, "weight", nn.Parameter(layer.weight.flip(0), requires_grad=False)),
    lambda layer: setattr(layer, "weight", nn.Parameter(layer.weight[:, :5], requires_grad=False)),
    lambda layer: delattr(layer, "weight"),
    lambda layer: parametrize.register_parametrization(layer, "weight", nn.Identity()),
    lambda layer: exec("layer.weight.data += 1", {"layer": layer}),
    lambda layer: nn.init.zeros_(layer.weight),
    lambda layer: parametrizations.weight_norm(layer),
    lambda layer: nn.utils.spectral_norm(layer),
    lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    lambda layer: layer.weight[0].detach().numpy().fill(0),
    lambda layer: layer.weight.set_(torch.zeros(5, 12)),
    lambda layer: layer.weight.data.view(torch.int32).zero_(),
    lambda layer: layer.weight.apply_(lambda _: 0.0),
    lambda layer: torch.from_dlpack(layer.weight),
    lambda layer: torch.utils.swap_tensors(layer.weight, nn.Parameter(torch.zeros(5, 12))),
    lambda layer: layer.quantized_weight.floats(layer.weight),
    lambda layer: layer.quantized_weight.fix(layer.quantized_weight.codes(layer.weight)),
])  # fmt: skip
@pytest.mark.parametrize("inference", [False, True])
def test_what_would_write_a_packed_weight_or_needs_its_floats_is_refused(use, inference):
    layer, _ = layer_of("linear", 4)
    layer.pack()
    before = layer.operator.weight.clone()
    refused = pytest.raises((StateError, ValueError), match=r"a float weight, got a packed one|read-only")
    with torch.inference_mode(inference), torch.no_grad(), refused:
        use(layer)
    assert layer.quantized_weight.fixed
    assert_same_bits(layer.operator.weight.detach(), before)


@pytest.mark.parametrize("write", [lambda c: c.neg_(), lambda c: c.data.neg_()], ids=["in place", "by data"])
@pytest.mark.parametrize(
    "config", [LayerConfig(), integer(LayerConfig()), INT16], ids=["simulated", "integer", "int16"]
)
def test_codes_that_are_written_are_heard_and_the_law_holds_from_there_on(config, write):
    layer, inputs = quantized(randomised(nn.Linear(16, 8)), config), walk((4, 16), 4)
    layer.pack()
    codes = layer._parameters["weight"].detach()
    before, output = play(layer, inputs), None
    layer.clock.start()
    for step, x in enumerate(inputs):
        if step == 2:
            write(codes)
            layer.operator.forget()
        output = evaluate(layer, x)
    state = state_of(layer)[0]
    layer.clock.stop()
    assert_within(output, state @ layer.quantized_weight.dense(None, torch.float32).T + layer.bias.detach(), 0.02)
    assert relative_error(output, before[-1][0]) > 0.5
    assert_same_bits(play(layer, inputs)[1][0], play(layer, inputs)[1][0])
