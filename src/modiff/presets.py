"""Named configs as functions, `modiff.apply(pipe, modiff.presets.w8a4())`, and configs from what a person types."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from modiff.config import LayerConfig, ModiffConfig, ModulationConfig, QuantizerConfig, WeightConfig
from modiff.errors import ConfigError, FormatError

Bits = int | None
AnyConfig = ModiffConfig | str | Mapping[str, Any] | Callable[[], ModiffConfig]
"""What stands for a config: itself, its name, its dictionary, or a preset without parentheses."""
FULL_PRECISION = 32


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


PRESETS: dict[str, Callable[[], ModiffConfig]] = {f.__name__: f for f in (w8a8, w8a4, w8a3, w4a8, w4a4)}
FAMILIES: dict[str, Callable[[Bits, Bits], ModiffConfig]] = {
    "plain": plain,
    "modulated": modulated,
    "published": published,
    "uncompensated": uncompensated,
    "tuned": tuned,  # type: ignore[dict-item]  # its activation bits cannot be None: named_config refuses that
}


def named_config(text: str) -> ModiffConfig:
    """The config that `text` names.

    Args:
        text: "w8a4" (a preset), "modulated:8:4" (a family of presets with weight bits and activation bits; 32 is full
            precision), either with ":integer" behind it to execute on integers, or the path of a JSON file written from
            `ModiffConfig.to_json()`.
    Raises: ConfigError for a name or bit width that does not exist; FormatError for a file that cannot be read.

    >>> named_config("modulated:8:4:integer") == w8a4().on_integers()
    True
    """
    name, colon, execution = text.rpartition(":")
    if execution == "integer" and colon:
        return named_config(name).on_integers()
    if text in PRESETS:
        return PRESETS[text]()
    family, *bits = text.split(":")
    if family in FAMILIES and len(bits) == 2 and all(b.isdecimal() for b in bits):
        weight, activation = (None if int(b) == FULL_PRECISION else int(b) for b in bits)
        if family == "tuned" and activation is None:
            raise ConfigError(
                "config: expected 2 to 8 activation bits for tuned, got 32. There is nothing to tune in full "
                "precision. Use modulated or fewer bits."
            )
        return FAMILIES[family](weight, activation)
    if text.endswith(".json") or Path(text).is_file():
        return ModiffConfig.from_json(_read(Path(text)))
    raise ConfigError(
        f"config: expected a preset ({', '.join(PRESETS)}), a family with weight and activation bits "
        f"({', '.join(FAMILIES)}, as in modulated:8:4), or a JSON file, got {text!r}. No config has this name. "
        "Use --config w8a4."
    )


def as_config(config: AnyConfig | None) -> ModiffConfig:
    """The config that a caller means: itself, a name, a dictionary, a preset without its parentheses; W8A8 for None.

    Raises: ConfigError or FormatError for anything else.

    >>> as_config("w8a4") == as_config(w8a4) == as_config(w8a4().to_dict()) == w8a4()
    True
    """
    if isinstance(config, str):
        return named_config(config)
    if isinstance(config, Mapping):
        return ModiffConfig.from_dict(dict(config))
    if callable(config) and not isinstance(config, type):
        config = config()
    if config is not None and not isinstance(config, ModiffConfig):
        raise ConfigError(
            f"config: expected a ModiffConfig, a name such as 'w8a4', or a dictionary, got {config!r}. It says which "
            "layers get which bits. Use modiff.presets.w8a8()."
        )
    return config or ModiffConfig()


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error.reason
        raise FormatError(
            f"{path}: expected a JSON file of a ModiffConfig, got {reason}. Write one from ModiffConfig.to_json()."
        ) from None
