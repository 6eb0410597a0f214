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
    "model.trajectory": "clone",
    "nn": "ModulatedConv1d ModulatedConv2d ModulatedConv3d ModulatedLinear",
}
"""The public names of each module: they load when they are first asked for, so `modiff --version` need not wait."""

if _typing.TYPE_CHECKING:  # the same names, for editors and type checkers
    from modiff import presets as presets
    from modiff.api import apply as apply
    from modiff.api import autotune as autotune
    from modiff.api import calibrate as calibrate
    from modiff.api import collect as collect
    from modiff.api import context as context
    from modiff.api import load as load
    from modiff.api import pack as pack
    from modiff.api import reconstruct as reconstruct
    from modiff.api import remove as remove
    from modiff.api import report as report
    from modiff.api import save as save
    from modiff.api import select as select
    from modiff.api import trajectory as trajectory
    from modiff.api import tune as tune
    from modiff.calibration.collect import replay as replay
    from modiff.calibration.data import CalibrationSet as CalibrationSet
    from modiff.calibration.data import Call as Call
    from modiff.calibration.reconstruct.config import ReconstructConfig as ReconstructConfig
    from modiff.calibration.reconstruct.config import ReconstructionReport as ReconstructionReport
    from modiff.calibration.timesteps import EveryStep as EveryStep
    from modiff.calibration.timesteps import NormalSteps as NormalSteps
    from modiff.calibration.timesteps import UniformGroups as UniformGroups
    from modiff.config import AttentionConfig as AttentionConfig
    from modiff.config import LayerConfig as LayerConfig
    from modiff.config import ModiffConfig as ModiffConfig
    from modiff.config import ModulationConfig as ModulationConfig
    from modiff.config import QuantizerConfig as QuantizerConfig
    from modiff.config import WeightConfig as WeightConfig
    from modiff.core.granularity import Granularity as Granularity
    from modiff.core.granularity import register_granularity as register_granularity
    from modiff.core.predictors import Predictor as Predictor
    from modiff.core.predictors import register_predictor as register_predictor
    from modiff.errors import CalibrationError as CalibrationError
    from modiff.errors import ConfigError as ConfigError
    from modiff.errors import FormatError as FormatError
    from modiff.errors import KernelError as KernelError
    from modiff.errors import ModiffError as ModiffError
    from modiff.errors import ModiffWarning as ModiffWarning
    from modiff.errors import StateError as StateError
    from modiff.hosts import Host as Host
    from modiff.hosts import register_host as register_host
    from modiff.hosts.diffusers.quantizer import ModiffDiffusersConfig as ModiffDiffusersConfig
    from modiff.methods import quantize as quantize
    from modiff.model.autotune import AutotuneResult as AutotuneResult
    from modiff.model.report import Report as Report
    from modiff.model.trajectory import clone as clone
    from modiff.nn import ModulatedConv1d as ModulatedConv1d
    from modiff.nn import ModulatedConv2d as ModulatedConv2d
    from modiff.nn import ModulatedConv3d as ModulatedConv3d
    from modiff.nn import ModulatedLinear as ModulatedLinear

__all__ = sorted(["presets", *" ".join(_HOMES.values()).split()])


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
