"""modiff: modulated quantization of diffusion models.

Every linear operator runs as a closed-loop predictive codec over the denoising steps: its input is predicted from the
past, the residual is coded in a few bits, and the operator is applied to the code alone (MoDiff, arXiv:2506.22463).

    report = modiff.apply(pipe, modiff.presets.w8a4())
    image = pipe(...)
    modiff.remove(pipe)
"""

from modiff import presets
from modiff.config import LayerConfig, ModiffConfig, ModulationConfig, QuantizerConfig, WeightConfig
from modiff.errors import CalibrationError, ConfigError, FormatError, KernelError, ModiffError, StateError
from modiff.hosts.verbs import apply, calibrate, context, remove, trajectory, tune
from modiff.model.report import Report
from modiff.model.select import select
from modiff.nn import ModulatedConv1d, ModulatedConv2d, ModulatedConv3d, ModulatedLinear

__version__ = "0.1.0"

__all__ = [
    "CalibrationError",
    "ConfigError",
    "FormatError",
    "KernelError",
    "LayerConfig",
    "ModiffConfig",
    "ModiffError",
    "ModulatedConv1d",
    "ModulatedConv2d",
    "ModulatedConv3d",
    "ModulatedLinear",
    "ModulationConfig",
    "QuantizerConfig",
    "Report",
    "StateError",
    "WeightConfig",
    "apply",
    "calibrate",
    "context",
    "presets",
    "remove",
    "select",
    "trajectory",
    "tune",
]
