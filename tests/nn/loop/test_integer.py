"""Layers on real integers: the codes and input states of the simulation bit for bit, outputs within float error."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import modiff
from modiff import LayerConfig, ModiffConfig, ModulationConfig, QuantizerConfig, WeightConfig
from modiff.nn.loop.simulated import InputState
from tests.helpers import assert_same_bits, assert_within, drifting, relative_error
from tests.nn.building import INT16, LAYERS, TIMES, W8A4, drawn, follows, integer, output_bound, same_bits, walk
from tests.recipes import evaluate, play, quantized, randomised

LINEAR = ModulationConfig(predictor="linear", gain=0.8)
PAPER = ModulationConfig(anchor_weights="quantized")
CONFIGS = {
    "W8A4": W8A4,
    "W8A8": LayerConfig(),
    "W4A3 clipped": LayerConfig(weight=WeightConfig(bits=4), activation=QuantizerConfig(bits=3, clip=0.7)),
    "one scale": LayerConfig(activation=QuantizerConfig(bits=6, granularity="tensor")),
    "linear predictor": LayerConfig(activation=QuantizerConfig(bits=4), modulation=LINEAR),
    "rotated": LayerConfig(activation=QuantizerConfig(bits=4), rotation="hadamard", rotation_block=8),
    "scales of every second step": LayerConfig(activation=QuantizerConfig(bits=4, refresh_every=2)),
    "anchored again": LayerConfig(modulation=ModulationConfig(reanchor_every=3), weight=WeightConfig(bits=4)),
    "linear, anchored again": LayerConfig(modulation=ModulationConfig(predictor="linear", reanchor_every=2)),
    "coded first step": LayerConfig(modulation=ModulationConfig(first_step="coded", rounds=2, reanchor_every=3)),
}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("config", CONFIGS)
def test_input_states_equal_the_simulation_bit_for_bit_and_outputs_within_float_error(layer, config):
    original, inputs, split = drawn(layer)
    ours = quantized(original, integer(CONFIGS[config]), split)
    assert ours.on_integers
    steps, simulated = play(ours, inputs, TIMES), play(quantized(original, CONFIGS[config], split), inputs, TIMES)
    follows(steps, simulated, output_bound(original, inputs[0], len(inputs)))
    same_bits(steps[:1], simulated[:1])
    if every := CONFIGS[config].modulation.reanchor_every:
        same_bits(steps[every::every], simulated[every::every])


@pytest.mark.parametrize("layer", ["linear", "conv", "conv of one pixel", "conv along one axis", "split conv"])
@pytest.mark.parametrize("rotation", ["none", "hadamard"])
def test_large_channels_have_scales_of_their_own_on_integers_and_in_the_simulation(layer, rotation):
    original, (first, *_), split = drawn(layer)
    axis, inputs = -1 if layer == "linear" else 1, walk(tuple(first.shape))
    for x in inputs:
        x.select(axis, 1).mul_(1e6)
        x.select(axis, 6).mul_(1e7)
    config = LayerConfig(large_channels=(1, 6), rotation=rotation, rotation_block=2)
    ours, theirs = quantized(original, integer(config), split), quantized(original, config, split)
    assert ours.spec.runs == ((4, 2, 2) if split else (len(original.weight[0]) - 2, 2))
    steps, simulated = play(ours, inputs, TIMES), play(theirs, inputs, TIMES)
    follows(steps, simulated, output_bound(original, inputs[0], len(inputs)))
    weight, exact = (w(ours.weight, torch.float32) for w in (ours.quantized_weight.dense, ours.quantized_weight.exact))
    for index in (0, 2):  # the law: A(a) + b at the anchor, and codes alone since
        moved = ours.spec.operate(steps[index][1] - steps[0][1], weight, None)
        anchored = ours.spec.operate(steps[0][1], exact, original.bias)
        assert relative_error(steps[index][0], (anchored + moved).detach()) < 1e-5


def jumping(shape: tuple[int, ...]) -> list[Tensor]:
    """The first sample jumps at step 2, all of them and by another size at the steps from 4 on, and some are zero."""
    inputs, fresh = walk(shape, 8), drifting(9, shape, 8, 1.0, torch.float32)
    inputs[2][0] = fresh[2][0]
    for step, size in ((4, 3.0), (5, 0.2), (6, 0.0), (7, 1.0)):
        inputs[step] = size * fresh[step]
    return inputs


def from_zero(original: nn.Module, inputs: list[Tensor], *configs: LayerConfig, split: int | None) -> list[list[bool]]:
    """At which steps a sample starts from zero, with each config; codes and states of the first two are the same."""
    times, flags, read = [900.0 - 80 * i for i in range(len(inputs))], [], InputState.read
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InputState, "read", lambda self, *a: (u := read(self, *a), flags.append(u.intra is not None))[0])
        ours, theirs, *_ = (play(quantized(original, each, split), inputs, times) for each in configs)
    follows(ours, theirs, 4 * output_bound(original, max(inputs, key=lambda x: float(x.abs().max())), len(inputs)))
    return [flags[i : i + len(inputs)] for i in range(0, len(flags), len(inputs))]


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("config", CONFIGS)
def test_samples_that_jump_are_coded_from_zero_as_in_the_simulation(layer, config):
    original, (first, *_), split = drawn(layer)
    config = CONFIGS[config]
    flags = from_zero(original, jumping(tuple(first.shape)), integer(config), config, split=split)
    assert flags[0] == flags[1]
    assert any(flags[0])


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("predictor", ["hold", "linear"])
def test_samples_that_leave_their_anchor_are_coded_from_zero_as_in_the_simulation(layer, predictor):
    """They turn by 22 degrees a step: after four they are further from where they started than from zero."""
    original, (first, *_), split = drawn(layer)
    axes, (one, other) = tuple(range(1, first.dim())), drifting(5, tuple(first.shape), 2, 1.0, torch.float32)
    other -= (other * one).mean(axes, keepdim=True) / one.square().mean(axes, keepdim=True) * one
    inputs = [one * turn.cos() + other * turn.sin() for turn in torch.arange(10) * torch.pi / 8]
    modulation = ModulationConfig(predictor=predictor)
    w4a8 = LayerConfig(weight=WeightConfig(bits=4), modulation=modulation)
    flags = from_zero(original, inputs, integer(w4a8), w4a8, LayerConfig(modulation=modulation), split=split)
    assert flags[0] == flags[1]
    assert (any(flags[0]), any(flags[2])) == (True, False)  # not with 8-bit weights


WALK = (0.19**0.5,) * 16  # of what was, 0.9 is left


@pytest.mark.parametrize("sizes", [(8, 6, 5, 4, 3, 2, 1.5, 1), (1, 1.5, 2, 3, 4, 5, 6, 8), (1,) * 8, WALK], ids=str)
@pytest.mark.parametrize("bits", ["W8A4", "W8A8", "W4A8"])
@pytest.mark.parametrize(
    "form",
    ["simulated", "integer", "int16", "linear", "linear integer", "refresh", "refresh int", "static", "static int",
     "static linear", "static linear int", "float16 int"],
)  # fmt: skip
def test_modulated_layers_are_never_worse_than_plain_ones_on_inputs_that_jump(form, bits, sizes):
    """As after a sampler that adds noise at each step."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 256), nn.SiLU(), nn.Linear(256, 256), nn.SiLU(), nn.Linear(256, 64)).eval()
    inputs, errors, weight = [torch.randn(32, 64)], [], WeightConfig(bits=int(bits[1]))
    for size in sizes:
        inputs.append((0.9 if sizes == WALK else 0.0) * inputs[-1] + size * torch.randn(32, 64))
    expected = [net(x) for x in inputs]
    for plain in (True, False):
        state = next((name for name in ("float16", "int16") if name in form), "float32")
        predictor = "linear" if "linear" in form else "hold"
        modulation = None if plain else ModulationConfig(state_dtype=state, predictor=predictor)
        execution = "integer" if "int" in form else "simulated"
        refresh, dynamic = 1 + ("refresh" in form and not plain), "static" not in form
        activation = QuantizerConfig(bits=int(bits[3]), refresh_every=refresh, dynamic=dynamic)
        layer = LayerConfig(weight=weight, activation=activation, modulation=modulation, execution=execution)
        modiff.apply(net, ModiffConfig(layer=layer, first_last="quantize"))

        def error() -> float:
            with modiff.trajectory(net), torch.no_grad():
                return sum(relative_error(net(x), e) for x, e in list(zip(inputs, expected, strict=True))[1:])

        if not dynamic:
            modiff.calibrate(net, error)
        errors.append(error())
        modiff.remove(net)
    assert errors[1] <= (1.6 if "refresh" in form and sizes == WALK else 1.02) * errors[0]  # an old scale clips


@pytest.mark.parametrize("config", [*map(integer, CONFIGS.values()), INT16], ids=[*CONFIGS, "int16"])
def test_steps_in_and_out_of_inference_mode_take_turns(config):
    original, inputs, split = drawn("split conv")
    ours = quantized(original, config, split)
    expected = [output for output, *_ in play(ours, inputs, TIMES)]
    ours.clock.start()
    for x, time, output, inference in zip(inputs, TIMES, expected, [1, 1, 0, 0, 1], strict=True):
        with torch.inference_mode(bool(inference)):
            assert_same_bits(evaluate(ours, x, time), output)
    ours.clock.stop()


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("bits", [4, 8])
def test_plain_layers_equal_the_simulation_within_float_error(layer, bits):
    original, inputs, split = drawn(layer, steps=2)
    config = LayerConfig(activation=QuantizerConfig(bits=bits), modulation=None)
    ours, theirs = quantized(original, integer(config), split), quantized(original, config, split)
    for x in inputs:
        assert_within(evaluate(ours, x), evaluate(theirs, x), output_bound(original, x, 1))


@settings(deadline=None, derandomize=True, max_examples=30)
@given(st.integers(1, 20), st.integers(1, 9), st.integers(2, 8), st.integers(2, 8), st.booleans(), st.integers(0, 99))
def test_any_shape_and_bits_follow_the_simulation(inputs, outputs, weight_bits, bits, conv, seed):
    original = randomised(nn.Conv2d(inputs, outputs, 3, padding=1) if conv else nn.Linear(inputs, outputs), seed)
    config = LayerConfig(weight=WeightConfig(bits=weight_bits), activation=QuantizerConfig(bits=bits))
    walked = walk((2, inputs, 3, 4) if conv else (2, 3, inputs), 4, seed=seed)
    steps, simulated = (play(quantized(original, each), walked) for each in (integer(config), config))
    follows(steps, simulated, output_bound(original, walked[0], 4) + 1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_output_has_the_dtype_of_the_input_and_the_state_keeps_its_own(dtype):
    original, inputs, _ = drawn("conv", dtype=dtype)
    steps = play(quantized(original, integer(W8A4)), inputs)
    follows(steps, play(quantized(original, W8A4), inputs), 1e-4 if dtype == torch.float64 else 0.1)
    assert {tuple(t.dtype for t in step) for step in steps} == {(dtype, torch.float32, torch.float32)}


@pytest.mark.parametrize("layer", ["linear", "conv", "split conv"])
@pytest.mark.parametrize(("state_dtype", "error"), [("float16", 2.0**-10), ("bfloat16", 2.0**-7)])
@pytest.mark.parametrize("predictor", ["hold", "linear"])
def test_states_of_half_the_width_are_rounded_as_in_the_simulation(layer, state_dtype, error, predictor):
    original, inputs, split = drawn(layer)
    modulation = ModulationConfig(state_dtype=state_dtype, predictor=predictor)
    config = LayerConfig(activation=QuantizerConfig(bits=4), modulation=modulation)
    steps, simulated = (play(quantized(original, c, split), inputs, TIMES) for c in (integer(config), config))
    assert steps[0][2].dtype == getattr(torch, state_dtype)
    largest = max(float(output_state.abs().max()) for _, _, output_state in simulated)
    follows(steps, simulated, 3 * len(inputs) * error * largest)  # the output state is rounded at each step


REASONS = {
    "keeps floats": (lambda: nn.Linear(8, 4), LayerConfig(weight=WeightConfig(bits=None))),
    "is not quantized": (lambda: nn.Linear(8, 4), LayerConfig(activation=QuantizerConfig(bits=None))),
    "0 bits send nothing": (lambda: nn.Linear(8, 4), LayerConfig(activation=QuantizerConfig(bits=0))),
    "zero point": (lambda: nn.Linear(8, 4), LayerConfig(activation=QuantizerConfig(symmetric=False))),
    "summed axis": (lambda: nn.Linear(8, 4), LayerConfig(activation=QuantizerConfig(granularity="input_channel"))),
    "several pixels": (lambda: nn.Conv2d(8, 4, 3), LayerConfig(activation=QuantizerConfig(granularity="token"))),
    "'circular'": (lambda: nn.Conv2d(8, 4, 3, padding=1, padding_mode="circular"), LayerConfig()),
    "one side more": (lambda: nn.Conv2d(8, 4, 2, padding="same"), LayerConfig()),
    "for study": (lambda: nn.Linear(8, 4), LayerConfig(modulation=ModulationConfig(error_compensation="none"))),
    "kept in float64": (lambda: nn.Linear(8, 4), LayerConfig(modulation=ModulationConfig(state_dtype="float64"))),
}


@pytest.mark.parametrize("reason", REASONS)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_what_no_kernel_can_run_is_simulated_and_says_why(reason):
    make, config = REASONS[reason]
    original = randomised(make())
    ours, theirs = quantized(original, integer(config)), quantized(original, config)
    assert not ours.on_integers
    assert reason in ours.unsupported
    inputs = walk((2, 8) if isinstance(original, nn.Linear) else (2, 8, 5, 5), steps=3)
    for layer in (ours, theirs):
        layer.clock.start()
    for x in inputs:
        assert_same_bits(evaluate(ours, x), evaluate(theirs, x))


@pytest.mark.parametrize("by", ["its bytes", "its codes"])
def test_a_weight_written_in_place_is_quantized_again_and_an_equal_one_keeps_its_kernel(monkeypatch, by):
    if by == "its codes":
        monkeypatch.setattr("modiff.nn.weight.fingerprint", lambda _: None)
    original, inputs = randomised(nn.Linear(16, 6)), walk((2, 16), steps=3)
    layer = quantized(original, integer(W8A4))
    play(layer, inputs)
    first = layer.loop.kernels
    play(layer, inputs)
    assert layer.loop.kernels is first
    with torch.no_grad():
        original.weight.mul_(-2.0)
    follows(play(layer, inputs), play(quantized(original, W8A4), inputs), 1e-4)
    assert layer.loop.kernels is not first


@pytest.mark.parametrize("split", [None, 5])
def test_a_packed_weight_gives_the_same_outputs_and_is_read_as_it_is_kept(split):
    config = LayerConfig(weight=WeightConfig(bits=4), activation=QuantizerConfig(bits=4), modulation=PAPER)
    original, inputs = randomised(nn.Conv2d(8, 4, 3, padding=1)), walk((2, 8, 4, 4))
    packed = quantized(original, integer(config), split)
    packed.pack()
    follows(play(packed, inputs), play(quantized(original, integer(config), split), inputs), 1e-4)
    assert packed.on_integers
    assert packed.loop.kernels[0].weight.dtype == (torch.uint8 if split is None else torch.int8)
