"""Named configs, `modiff.apply(pipe, modiff.presets.w8a4())`, and what a person types or gives instead of one."""

import os
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from modiff.config import LayerConfig, ModiffConfig, ModulationConfig, QuantizerConfig, Rotation, WeightConfig
from modiff.errors import ConfigError, FormatError

Bits = int | None
AnyConfig = ModiffConfig | str | os.PathLike[str] | Mapping[str, Any] | Callable[[], ModiffConfig]
"""What stands for a config: see `as_config`."""
FULL_PRECISION = 32


def plain(weight_bits: Bits = 8, activation_bits: Bits = 8) -> ModiffConfig:
    """Post-training quantization without memory: every activation is coded from nothing at every step."""
    return _alike(weight_bits, QuantizerConfig(bits=activation_bits), None)


def modulated(weight_bits: Bits = 8, activation_bits: Bits = 8) -> ModiffConfig:
    """Hold predictor, error compensation, dynamic scales; the first step with unrounded inputs and weights."""
    return _alike(weight_bits, QuantizerConfig(bits=activation_bits), ModulationConfig())


def published(weight_bits: Bits = 8, activation_bits: Bits = 8) -> ModiffConfig:
    """MoDiff as published: `modulated`, but quantized weights from the first step on."""
    return _alike(weight_bits, QuantizerConfig(bits=activation_bits), ModulationConfig(anchor_weights="quantized"))


def uncompensated(weight_bits: Bits = 8, activation_bits: Bits = 8) -> ModiffConfig:
    """The paper's ablation: differences are coded, but their rounding errors are never sent again."""
    loop = ModulationConfig(error_compensation="none", anchor_weights="quantized")
    return _alike(weight_bits, QuantizerConfig(bits=activation_bits), loop)


def tuned(weight_bits: Bits = 8, activation_bits: Bits = 4, *, bits: Bits = None) -> ModiffConfig:
    """Rotated, with the clip ratio that did best on the study models; `modiff.tune` measures what suits yours.

    bits: as `modiff.tune` has it, another name of `activation_bits`.
    Raises: ConfigError for activations in full precision: there is nothing to tune.
    """
    activation_bits = activation_bits if bits is None else bits
    if activation_bits is None:
        raise ConfigError("tuned: expected 2 to 8 activation bits, got full precision (32). There is nothing to tune. "
                          "Use modulated or fewer bits.")  # fmt: skip
    activation = QuantizerConfig(bits=activation_bits, clip={2: 0.45, 3: 0.6, 4: 0.8}.get(activation_bits, 1.0))
    return _alike(weight_bits, activation, ModulationConfig(), "hadamard")


def _alike(
    weight_bits: Bits, activation: QuantizerConfig, modulation: ModulationConfig | None, rotation: Rotation = "none"
) -> ModiffConfig:
    weight = WeightConfig(bits=weight_bits)
    return ModiffConfig(
        layer=LayerConfig(weight=weight, activation=activation, modulation=modulation, rotation=rotation)
    )


_BITS = ((8, 8), (8, 7), (8, 4), (8, 3), (4, 8), (4, 4))
PRESETS: dict[str, Callable[[], ModiffConfig]] = {f"w{w}a{a}": partial(modulated, w, a) for w, a in _BITS}
"""`modulated` at these bits, weights first. 7 bits are the most that sums exactly on processors without VNNI."""
w8a8, w8a7, w8a4, w8a3, w4a8, w4a4 = PRESETS.values()
FAMILIES: dict[str, Callable[[Bits, Bits], ModiffConfig]] = {
    family.__name__: family for family in (plain, modulated, published, uncompensated, tuned)
}


def as_config(config: AnyConfig | None) -> ModiffConfig:
    """The config that a caller or a command line means; W8A8 for None.

    Args:
        config: a ModiffConfig; its dictionary; a preset, with parentheses or without; the path of a JSON file written
            from `to_json()`; or a name: "w8a4", or "modulated:8:4" (a family of presets with weight bits and
            activation bits; 32 is full precision), either with ":integer" behind it to execute on integers.
    Raises: ConfigError for a name or bit width that does not exist; FormatError for a file that cannot be read.

    >>> as_config("modulated:8:4") == as_config("w8a4") == as_config(w8a4) == as_config(w8a4().to_dict()) == w8a4()
    True
    """
    if isinstance(config, str):
        return _named(config)
    if isinstance(config, os.PathLike):
        return _read(Path(config))
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


def _named(text: str) -> ModiffConfig:
    name, colon, execution = text.rpartition(":")
    if colon and execution == "integer":
        return _named(name).on_integers()
    short = re.fullmatch(r"w(\d+)a(\d+)", text.lower())
    family, *bits = ["modulated", *short.groups()] if short else text.split(":")
    if family in FAMILIES and len(bits) == 2 and all(b.isdecimal() for b in bits):
        weight, activation = (None if int(b) == FULL_PRECISION else int(b) for b in bits)
        try:
            return FAMILIES[family](weight, activation)
        except ConfigError as error:
            raise ConfigError(f"{text}: {error}") from error
    if text.endswith(".json") or Path(text).is_file():
        return _read(Path(text))
    raise ConfigError(
        f"config: expected bits such as {', '.join(PRESETS)}, a family with weight and activation bits "
        f"({', '.join(FAMILIES)}, as in modulated:8:4), or a JSON file, got {text!r}. No config has this name. "
        "Use config='w8a4'."
    )


def _read(path: Path) -> ModiffConfig:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise FormatError(f"{path}: expected a JSON file of a ModiffConfig, got {reason}. Write one from "
                          "ModiffConfig.to_json().") from None  # fmt: skip
    try:
        return ModiffConfig.from_json(text)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
