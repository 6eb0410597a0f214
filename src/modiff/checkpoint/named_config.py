"""A config from what a person types: a preset's name, a family with bit widths, or a JSON file."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from modiff import presets
from modiff.config import ModiffConfig
from modiff.errors import ConfigError, FormatError

AnyConfig = ModiffConfig | str | Mapping[str, Any] | Callable[[], ModiffConfig]
"""What stands for a config: itself, its name, its dictionary, or a preset without parentheses."""
FULL_PRECISION = 32
FAMILIES: dict[str, Callable[[int | None, int | None], ModiffConfig]] = {
    "plain": presets.plain,
    "modulated": presets.modulated,
    "published": presets.published,
    "uncompensated": presets.uncompensated,
    "tuned": presets.tuned,  # type: ignore[dict-item]  # its activation bits cannot be None; its guard says so
}


def preset_names() -> tuple[str, ...]:
    """The presets that need no arguments: w8a8, w8a4, ..."""
    found = [n for n, f in vars(presets).items() if inspect.isfunction(f) and n not in FAMILIES]
    return tuple(sorted(n for n in found if not inspect.signature(getattr(presets, n)).parameters))


def named_config(text: str) -> ModiffConfig:
    """The config that `text` names.

    Args:
        text: "w8a4" (a preset), "modulated:8:4" (a family of presets with weight bits and activation bits; 32 is full
            precision), either with ":integer" behind it to execute on integers, or the path of a JSON file written from
            `ModiffConfig.to_json()`.
    Raises: ConfigError for a name or bit width that does not exist; FormatError for a file that cannot be read.

    >>> named_config("modulated:8:4") == presets.w8a4()
    True
    >>> named_config("w8a4:integer") == presets.w8a4().on_integers()
    True
    """
    name, colon, execution = text.rpartition(":")
    if execution == "integer" and colon:
        return named_config(name).on_integers()
    if text in preset_names():
        return getattr(presets, text)()
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
        return _read(Path(text))
    raise ConfigError(
        f"config: expected a preset ({', '.join(preset_names())}), a family with weight and activation bits "
        f"({', '.join(FAMILIES)}, as in modulated:8:4), or a JSON file, got {text!r}. It is none of these. "
        "Use --config w8a4."
    )


def as_config(config: AnyConfig | None) -> ModiffConfig:
    """The config that a caller means: itself, a name, a dictionary, a preset without its parentheses; W8A8 for None.

    Raises: ConfigError or FormatError for anything else.

    >>> as_config("w8a4") == as_config(presets.w8a4) == as_config(presets.w8a4().to_dict()) == presets.w8a4()
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


def _read(path: Path) -> ModiffConfig:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error.reason
        raise FormatError(
            f"{path}: expected a JSON file of a ModiffConfig, got {reason}. Write one from ModiffConfig.to_json()."
        ) from None
    return ModiffConfig.from_json(text)
