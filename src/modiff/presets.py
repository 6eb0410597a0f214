"""Named configs as functions: `modiff.apply(pipe, modiff.presets.w8a4())`."""

from __future__ import annotations

from modiff.config import LayerConfig, ModiffConfig, ModulationConfig, QuantizerConfig, WeightConfig

Bits = int | None


def plain(weight_bits: Bits = 8, activation_bits: Bits = 8) -> ModiffConfig:
    """Post-training quantization without memory: every activation is coded from nothing at every step."""
    layer = LayerConfig(
        weight=WeightConfig(bits=weight_bits), activation=QuantizerConfig(bits=activation_bits), modulation=None
    )
    return ModiffConfig(layer=layer)


def modulated(weight_bits: Bits = 8, activation_bits: Bits = 8) -> ModiffConfig:
    """Hold predictor, error compensation, dynamic scales; the first step with unrounded inputs and weights."""
    layer = LayerConfig(weight=WeightConfig(bits=weight_bits), activation=QuantizerConfig(bits=activation_bits))
    return ModiffConfig(layer=layer)


def published(weight_bits: Bits = 8, activation_bits: Bits = 8) -> ModiffConfig:
    """MoDiff as published: `modulated`, but quantized weights from the first step on."""
    layer = LayerConfig(
        weight=WeightConfig(bits=weight_bits),
        activation=QuantizerConfig(bits=activation_bits),
        modulation=ModulationConfig(anchor_weights="quantized"),
    )
    return ModiffConfig(layer=layer)


def uncompensated(weight_bits: Bits = 8, activation_bits: Bits = 8) -> ModiffConfig:
    """The paper's ablation: differences are coded, but their rounding errors are never sent again."""
    layer = LayerConfig(
        weight=WeightConfig(bits=weight_bits),
        activation=QuantizerConfig(bits=activation_bits),
        modulation=ModulationConfig(error_compensation="none", anchor_weights="quantized"),
    )
    return ModiffConfig(layer=layer)


def tuned(weight_bits: Bits = 8, activation_bits: int = 4) -> ModiffConfig:
    """Clip ratio, predictor and rotation that did best on the study models; `modiff.tune` refines them for yours."""
    if activation_bits >= 4:
        clip, modulation = 0.8 if activation_bits == 4 else 1.0, ModulationConfig(predictor="linear", gain=0.8)
    elif activation_bits == 3:
        clip, modulation = 0.6, ModulationConfig(predictor="linear", gain=0.8)
    else:
        clip, modulation = 0.45, ModulationConfig()
    layer = LayerConfig(
        weight=WeightConfig(bits=weight_bits),
        activation=QuantizerConfig(bits=activation_bits, clip=clip),
        modulation=modulation,
        rotation="hadamard",
    )
    return ModiffConfig(layer=layer)


def w8a8() -> ModiffConfig:
    """Modulated, 8-bit weights and residuals."""
    return modulated(8, 8)


def w8a4() -> ModiffConfig:
    """Modulated, 8-bit weights, 4-bit residuals."""
    return modulated(8, 4)


def w8a3() -> ModiffConfig:
    """Modulated, 8-bit weights, 3-bit residuals."""
    return modulated(8, 3)


def w4a8() -> ModiffConfig:
    """Modulated, 4-bit weights, 8-bit residuals."""
    return modulated(4, 8)


def w4a4() -> ModiffConfig:
    """Modulated, 4-bit weights, 4-bit residuals."""
    return modulated(4, 4)
