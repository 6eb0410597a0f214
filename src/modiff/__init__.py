"""modiff: modulated quantization of diffusion models.

Every linear operator runs as a closed-loop predictive codec over the denoising steps: its input is predicted from the
past, the residual is coded in a few bits, and the operator is applied to the code alone (MoDiff, arXiv:2506.22463).

    report = modiff.apply(pipe, modiff.presets.w8a4())
    image = pipe(...)
    modiff.remove(pipe)
"""

import typing as _typing

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
from modiff.checkpoint.layout import VERSION as __version__  # noqa: F401
from modiff.config import AttentionConfig, LayerConfig, ModiffConfig, ModulationConfig, QuantizerConfig, WeightConfig
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
from modiff.methods import quantize
from modiff.model.autotune import AutotuneResult
from modiff.model.report import Report
from modiff.nn import ModulatedConv1d, ModulatedConv2d, ModulatedConv3d, ModulatedLinear

if _typing.TYPE_CHECKING:
    from modiff.hosts.diffusers.quantizer import ModiffDiffusersConfig


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
    """`ModiffDiffusersConfig` loads diffusers, so it waits until it is asked for."""
    if name == "ModiffDiffusersConfig":
        from modiff.hosts import diffusers_host

        diffusers_host()  # lets diffusers read folders that hold models of modiff
        from modiff.hosts.diffusers.quantizer import ModiffDiffusersConfig

        return ModiffDiffusersConfig
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
