"""modiff: modulated quantization of diffusion models.

Every linear operator runs as a closed-loop predictive codec over the denoising steps: its input is predicted from the
past, the residual is coded in a few bits, and the operator is applied to the code alone (MoDiff, arXiv:2506.22463).

    report = modiff.apply(pipe, modiff.presets.w8a4())
    image = pipe(...)
    modiff.remove(pipe)
"""

import typing as _typing

from modiff import presets
from modiff.config import AttentionConfig, LayerConfig, ModiffConfig, ModulationConfig, QuantizerConfig, WeightConfig
from modiff.errors import CalibrationError, ConfigError, FormatError, KernelError, ModiffError, StateError
from modiff.hosts.calibration_collect import collect
from modiff.hosts.gate import gate
from modiff.hosts.reconstruct import reconstruct
from modiff.hosts.verbs import apply, calibrate, context, load, pack, remove, save, trajectory, tune
from modiff.model.calibration_set import CalibrationSet, Call
from modiff.model.gate import Gate
from modiff.model.reconstruct_config import ReconstructConfig
from modiff.model.reconstruct_report import ReconstructionReport
from modiff.model.replay import replay
from modiff.model.report import Report
from modiff.model.select import select
from modiff.model.timesteps import EveryStep, NormalSteps, UniformGroups
from modiff.nn import ModulatedConv1d, ModulatedConv2d, ModulatedConv3d, ModulatedLinear

if _typing.TYPE_CHECKING:
    from modiff.hosts.quantizer import ModiffDiffusersConfig

__version__ = "0.1.0"

__all__ = [
    "AttentionConfig",
    "CalibrationError",
    "CalibrationSet",
    "Call",
    "ConfigError",
    "EveryStep",
    "FormatError",
    "Gate",
    "KernelError",
    "LayerConfig",
    "ModiffConfig",
    "ModiffDiffusersConfig",
    "ModiffError",
    "ModulatedConv1d",
    "ModulatedConv2d",
    "ModulatedConv3d",
    "ModulatedLinear",
    "ModulationConfig",
    "NormalSteps",
    "QuantizerConfig",
    "ReconstructConfig",
    "ReconstructionReport",
    "Report",
    "StateError",
    "UniformGroups",
    "WeightConfig",
    "apply",
    "calibrate",
    "collect",
    "context",
    "gate",
    "load",
    "pack",
    "presets",
    "reconstruct",
    "remove",
    "replay",
    "save",
    "select",
    "trajectory",
    "tune",
]


def __getattr__(name: str) -> _typing.Any:
    """`ModiffDiffusersConfig` loads diffusers, so it waits until it is asked for."""
    if name == "ModiffDiffusersConfig":
        from modiff.hosts.quantizer import ModiffDiffusersConfig

        return ModiffDiffusersConfig
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
