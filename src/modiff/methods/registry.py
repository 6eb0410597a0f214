"""The methods by name: what to say to quantize, with which settings, and which combinations mean nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modiff.calibration.reconstruct.config import ReconstructConfig
from modiff.config import JsonConfig, ModulationConfig
from modiff.errors import ConfigError
from modiff.methods.accuquant import AccuquantConfig, apply_accuquant
from modiff.methods.modiff import ModiffMethodConfig, apply_modiff
from modiff.methods.ptq4dm import Ptq4dmConfig, apply_ptq4dm
from modiff.methods.q_diffusion import QDiffusionConfig, apply_q_diffusion
from modiff.methods.tfmq_dm import TfmqDmConfig, apply_tfmq_dm
from modiff.model.report import Report


@dataclass(frozen=True)
class Method:
    """A published method.

    config: its settings; without arguments, the paper's. quick: those for the embedded model and others of its size.
    plain, modulated: why it is refused without, or with modulation; empty where it is not.
    """

    config: type[JsonConfig]
    apply: Callable[..., Report]
    quick: Callable[[], JsonConfig]
    plain: str = ""
    modulated: str = ""


def _quick_ptq4dm() -> Ptq4dmConfig:
    return Ptq4dmConfig(samples=256, steps=50, reconstruction=ReconstructConfig.quick_weights())


METHODS: dict[str, Method] = {
    "q_diffusion": Method(QDiffusionConfig, apply_q_diffusion, QDiffusionConfig.quick),
    "ptq4dm": Method(Ptq4dmConfig, apply_ptq4dm, _quick_ptq4dm),
    "tfmq_dm": Method(TfmqDmConfig, apply_tfmq_dm, TfmqDmConfig.quick),
    "accuquant": Method(
        AccuquantConfig,
        apply_accuquant,
        AccuquantConfig,
        modulated="It learns scales of whole activations, and of one step without the steps before it; what a "
        "modulated layer codes depends on those",
    ),
    "modiff": Method(
        ModiffMethodConfig,
        apply_modiff,
        ModiffMethodConfig.quick,
        plain="MoDiff is modulation: without it, its scales of residuals would serve whole activations",
    ),
}
"""By the name that `apply_<name>` has."""


def method_named(name: str) -> Method:
    """The method of a name; "-" is as good as "_". Raises: ConfigError for a name that no method has."""
    found = METHODS.get(name.replace("-", "_"))
    if found is None:
        raise ConfigError(f"method: expected one of {', '.join(METHODS)}, got {name!r}. Pick one of them.")
    return found


def name_of(config: JsonConfig) -> str:
    """The name of the method whose settings these are. Raises: ConfigError for others."""
    for name, method in METHODS.items():
        if type(config) is method.config:
            return name
    known = ", ".join(method.config.__name__ for method in METHODS.values())
    raise ConfigError(f"method: expected one of {known}, got a {type(config).__name__}. Its type names the method. "
                      "Give the settings of a method.")  # fmt: skip


def method_config(
    name: str,
    *,
    quick: bool = False,
    values: dict[str, Any] | None = None,
    modulated: bool | None = None,
    changes: dict[str, Any] | None = None,
) -> JsonConfig:
    """The settings of a method: the paper's or the quick ones, then `values`, then `changes`.

    Args:
        values: fields as JSON has them, for example of a file; those that it lacks stay.
        modulated: True for residuals, False for whole activations, None as the settings say.
        changes: fields, for example {"weight_bits": 4}.
    Raises: ConfigError for a name, field or value that does not exist, or a combination that is refused.

    >>> method_config("ptq4dm", quick=True, changes={"activation_bits": 4}).activation_bits
    4
    """
    method = method_named(name)
    config = method.quick() if quick else method.config()
    fields = [field.name for field in dataclasses.fields(config)]  # type: ignore[arg-type]
    for field in changes or {}:
        if field not in fields:
            raise ConfigError(f"{name}: expected one of {', '.join(fields)}, got {field!r}. It has no such setting. "
                              "Leave it out.")  # fmt: skip
    merged = _checked(values, method.config.__name__)
    if changes or merged:
        config = method.config.from_dict(_merged(config.to_dict(), merged) | (changes or {}))
    return config if modulated is None else _modulated(name, method, config, modulated)


def _merged(present: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """`values` over the present ones; of settings inside of settings too, those that it lacks stay."""
    found = dict(present)
    for name, value in values.items():
        inside = found.get(name)
        found[name] = _merged(inside, value) if isinstance(inside, dict) and isinstance(value, dict) else value
    return found


def _checked(values: dict[str, Any] | None, name: str) -> dict[str, Any]:
    if values is not None and not isinstance(values, dict):
        raise ConfigError(f"{name}: expected an object with named fields, got {values!r}. Write it as {{}}.")
    return values or {}


def _modulated(name: str, method: Method, config: JsonConfig, modulated: bool) -> JsonConfig:
    """The same settings with or without modulation. Raises: ConfigError with the reason where that is refused."""
    reason = method.modulated if modulated else method.plain
    if reason:
        takers = [n for n, m in METHODS.items() if not (m.modulated if modulated else m.plain)]
        raise ConfigError(
            f"{name}: expected {'no ' if modulated else ''}modulation, got {'it' if modulated else 'none'}. {reason}. "
            f"Use {' or '.join(takers)}."
        )
    fields = {field.name for field in dataclasses.fields(config)}  # type: ignore[arg-type]
    if method.plain or "modulation" not in fields or (getattr(config, "modulation", None) is not None) == modulated:
        return config
    value = ModulationConfig() if modulated else None
    return dataclasses.replace(config, modulation=value)  # type: ignore[type-var]


def quantize(
    pipe: Any,
    config: JsonConfig,
    *,
    run: Callable[[int], object] | None = None,
    folder: str | Path | None = None,
    progress: bool = True,
) -> Report:
    """Quantize a pipeline's denoiser by the method whose settings `config` are, in place.

    Args:
        run: `run(i)` generates the images of trajectory i; needed where the pipeline takes a prompt.
        folder: of finished parts; the same call goes on from them.
    Raises: ConfigError if the folder holds parts of another job, and as the method.
    """
    method = METHODS[name_of(config)]
    return method.apply(pipe, config, run=run, folder=folder, progress=progress)
