"""Hypothesis strategies: configs that the guards accept, and trajectories of drifting tensors."""

import dataclasses

from hypothesis import strategies as st
from torch import Tensor

from modiff import AttentionConfig, LayerConfig, ModiffConfig, ModulationConfig, QuantizerConfig, WeightConfig
from tests.helpers import drifting

CLIPS = st.sampled_from([1.0, 0.8, 0.6, 0.45])
GAINS = st.sampled_from([0.3, 0.5, 0.8, 1.0])


@st.composite
def trajectories(draw: st.DrawFn, shape: tuple[int, ...], max_steps: int = 6) -> list[Tensor]:
    """Float64 inputs of 2 to `max_steps` steps that change by 1 to 50 % a step, or are fresh noise at each."""
    steps = draw(st.integers(2, max_steps))
    return drifting(draw(st.integers(0, 2**31)), shape, steps, draw(st.sampled_from([0.01, 0.1, 0.5, 1.0])))


@st.composite
def quantizer_configs(draw: st.DrawFn, lowest: tuple[int | None, ...] = (0, None)) -> QuantizerConfig:
    """Any valid activation quantizer; `lowest` are the special bit widths allowed beside 2 to 8."""
    dynamic, symmetric = draw(st.booleans()), draw(st.booleans())
    bits, fixed = draw(st.sampled_from([*lowest, 2, 3, 4, 5, 6, 7, 8])), ("auto", "tensor", "input_channel")
    granularity = draw(st.sampled_from((*fixed, "sample", "token") if dynamic else fixed))
    groups = 1 if dynamic else draw(st.sampled_from([0, 1, 4]))
    return QuantizerConfig(bits=bits, granularity=granularity, symmetric=symmetric, dynamic=dynamic, clip=draw(CLIPS),
                           step_groups=groups)  # fmt: skip


@st.composite
def modulation_configs(draw: st.DrawFn, activation: QuantizerConfig) -> ModulationConfig:
    """Any modulation that LayerConfig accepts beside `activation`."""
    bits, clip = activation.bits, activation.clip
    compensation = draw(st.sampled_from(["closed_loop", "closed_loop", "none"]))
    stable = bits is None or bits >= 4 or bits == 0 or (bits == 3 and clip < 1)
    linear = stable and compensation == "closed_loop"
    return ModulationConfig(
        predictor=draw(st.sampled_from(["hold", "linear"])) if linear else "hold",
        gain=draw(GAINS),
        error_compensation=compensation,
        first_step="full_precision" if bits == 0 else draw(st.sampled_from(["full_precision", "coded"])),
        rounds=draw(st.integers(1, 3)),
        anchor_weights=draw(st.sampled_from(["exact", "quantized"])),
        reanchor_every=draw(st.sampled_from([0, 0, 2, 3])),
        stagger=draw(st.booleans()),
        state_dtype=draw(st.sampled_from(["float32", "float64", "float16", "bfloat16"])),
    )


@st.composite
def layer_configs(draw: st.DrawFn) -> LayerConfig:
    plain = draw(st.booleans())
    activation = draw(quantizer_configs(lowest=(None,) if plain else (0, None)))
    weights = st.builds(WeightConfig, bits=st.sampled_from([None, 2, 4, 8]), search=st.sampled_from(["minmax", "mse"]))
    return LayerConfig(
        weight=draw(weights),
        activation=activation,
        modulation=None if plain else draw(modulation_configs(activation)),
        rotation=draw(st.sampled_from(["none", "hadamard"])),
        rotation_block=draw(st.sampled_from([2, 16, 64])),
        execution=draw(st.sampled_from(["simulated", "integer"])),
    )


@st.composite
def attention_configs(draw: st.DrawFn) -> AttentionConfig:
    shared = st.sampled_from(["auto", "tensor"])
    operands, softmax = (
        dataclasses.replace(draw(quantizer_configs(lowest=(None,))), granularity=draw(shared)) for _ in range(2)
    )
    bits = draw(st.sampled_from([None, 2, 8, 16]))
    softmax = dataclasses.replace(softmax, symmetric=False, lowest="zero", bits=bits)
    return AttentionConfig(operands=operands, softmax=softmax, include=draw(st.sampled_from([("*",), ("down*",)])))


@st.composite
def model_configs(draw: st.DrawFn) -> ModiffConfig:
    patterns = st.lists(st.text("abc*.[]?", min_size=1, max_size=6), max_size=3).map(tuple)
    pairs = st.lists(st.tuples(st.text("ab*.", min_size=1, max_size=4), layer_configs()), max_size=2).map(tuple)
    return ModiffConfig(
        layer=draw(layer_configs()),
        include=draw(patterns),
        exclude=draw(patterns),
        default_exclude=draw(st.none() | patterns),
        overrides=draw(pairs),
        first_last=draw(st.sampled_from(["full_precision", "quantize"])),
        min_weights=draw(st.integers(0, 10**6)),
        share_residuals=draw(st.sampled_from(["auto", "off"])),
        split_shortcuts=draw(st.sampled_from(["auto", "off"])),
        attention=draw(st.none() | attention_configs()),
    )
