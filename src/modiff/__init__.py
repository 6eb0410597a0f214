"""modiff: modulated quantization of diffusion models.

Every linear operator runs as a closed-loop predictive codec over the denoising steps: its input is predicted from the
past, the residual is coded in a few bits, and the operator is applied to the code alone (MoDiff, arXiv:2506.22463).

    report = modiff.apply(pipe, modiff.presets.w8a4())
    image = pipe(...)
    modiff.remove(pipe)
"""

import importlib as _importlib
import importlib.util as _util
import typing as _typing

from modiff.config import VERSION as __version__  # noqa: F401

_HOMES = {
    "api": "apply autotune calibrate collect context load pack reconstruct remove report save select trajectory tune",
    "calibration.collect": "replay",
    "calibration.data": "CalibrationSet Call",
    "calibration.reconstruct.config": "ReconstructConfig ReconstructionReport",
    "calibration.timesteps": "EveryStep NormalSteps UniformGroups",
    "config": "AttentionConfig LayerConfig ModiffConfig ModulationConfig QuantizerConfig WeightConfig",
    "core.granularity": "Granularity register_granularity",
    "core.predictors": "Predictor register_predictor",
    "errors": "CalibrationError ConfigError FormatError KernelError ModiffError ModiffWarning StateError",
    "hosts": "Host register_host",
    "hosts.diffusers.quantizer": "ModiffDiffusersConfig",
    "methods": "quantize",
    "model.autotune": "AutotuneResult",
    "model.report": "Report",
    "nn": "ModulatedConv1d ModulatedConv2d ModulatedConv3d ModulatedLinear",
}
"""The public names of each module: they load when they are first asked for, so `modiff --version` need not wait."""

if _typing.TYPE_CHECKING:  # the same names, for editors and type checkers
    from modiff import presets
    from modiff.api import (
        apply,
        autotune,
        calibrate,
        collect,
        context,
        load,
        pack,
        reconstruct,
        remove,
        report,
        save,
        select,
        trajectory,
        tune,
    )
    from modiff.calibration.collect import replay
    from modiff.calibration.data import CalibrationSet, Call
    from modiff.calibration.reconstruct.config import ReconstructConfig, ReconstructionReport
    from modiff.calibration.timesteps import EveryStep, NormalSteps, UniformGroups
    from modiff.config import (
        AttentionConfig,
        LayerConfig,
        ModiffConfig,
        ModulationConfig,
        QuantizerConfig,
        WeightConfig,
    )
    from modiff.core.granularity import Granularity, register_granularity
    from modiff.core.predictors import Predictor, register_predictor
    from modiff.errors import (
        CalibrationError,
        ConfigError,
        FormatError,
        KernelError,
        ModiffError,
        ModiffWarning,
        StateError,
    )
    from modiff.hosts import Host, register_host
    from modiff.hosts.diffusers.quantizer import ModiffDiffusersConfig
    from modiff.methods import quantize
    from modiff.model.autotune import AutotuneResult
    from modiff.model.report import Report
    from modiff.nn import ModulatedConv1d, ModulatedConv2d, ModulatedConv3d, ModulatedLinear

__all__ = [
    "AttentionConfig",
    "AutotuneResult",
    "CalibrationError",
    "CalibrationSet",
    "Call",
    "ConfigError",
    "EveryStep",
    "FormatError",
    "Granularity",
    "Host",
    "KernelError",
    "LayerConfig",
    "ModiffConfig",
    "ModiffDiffusersConfig",
    "ModiffError",
    "ModiffWarning",
    "ModulatedConv1d",
    "ModulatedConv2d",
    "ModulatedConv3d",
    "ModulatedLinear",
    "ModulationConfig",
    "NormalSteps",
    "Predictor",
    "QuantizerConfig",
    "ReconstructConfig",
    "ReconstructionReport",
    "Report",
    "StateError",
    "UniformGroups",
    "WeightConfig",
    "apply",
    "autotune",
    "calibrate",
    "collect",
    "context",
    "load",
    "pack",
    "presets",
    "quantize",
    "reconstruct",
    "register_granularity",
    "register_host",
    "register_predictor",
    "remove",
    "replay",
    "report",
    "save",
    "select",
    "trajectory",
    "tune",
]


def __getattr__(name: str) -> _typing.Any:
    """A public name, or a module of the package."""
    home = next((module for module, names in _HOMES.items() if name in names.split()), None)
    if home == "hosts.diffusers.quantizer":
        _importlib.import_module("modiff.hosts").diffusers_host()  # lets diffusers read folders that modiff wrote
    if home is not None:
        value = getattr(_importlib.import_module(f"modiff.{home}"), name)
    elif not name.startswith("_") and _util.find_spec(f"modiff.{name}"):
        value = _importlib.import_module(f"modiff.{name}")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
