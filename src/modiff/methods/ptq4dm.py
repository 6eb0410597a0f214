"""PTQ4DM: calibrate on states of the denoising process, more of them near the image (Shang et al., CVPR 2023)."""

from dataclasses import dataclass
from typing import Self

from modiff.calibration.timesteps import NormalSteps
from modiff.config import ModulationConfig
from modiff.core.observers import MSEObserver
from modiff.methods.recipe import MethodConfig, MethodJob, MethodReport, boundary_overrides, every_layer
from modiff.methods.registry import register


@dataclass(frozen=True, kw_only=True)
class Ptq4dmConfig(MethodConfig):
    """PTQ4DM's settings: 8-bit convolutions and linear layers, NDTC calibration, ranges searched by MSE, p = 2.4.

    weight_bits, activation_bits: None keeps floats. The first and the last layer have 8 bits in any case.
    samples: states to calibrate on, one from each trajectory. mean: of their steps, see `NormalSteps`.
    trials: ranges tried, 1 % apart.
    modulation: None is the published method; with it, ranges are those of residuals, from pairs of neighbouring steps.

    Of the released code there is no option for: states labelled with the step counted from the wrong end, one class for
    all samples of conditional models, step indices fed without the respacing map, and ranges smoothed over batches.
    Cost: `samples` trajectories, an evaluation for each sample, and `trials` passes over the values kept of each layer.
    """

    samples: int | None = 1024
    mean: float = 0.4
    trials: int = 100
    modulation: ModulationConfig | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("trials", 1 <= self.trials <= 100, "1 to 100", "Each shrinks by 1 %.")
        NormalSteps(mean=self.mean)

    @classmethod
    def quick(cls) -> Self:
        """For the embedded model and others of its size, in minutes on two cores."""
        return cls(samples=256, steps=50)


@register(Ptq4dmConfig)
def ptq4dm(job: MethodJob, config: Ptq4dmConfig) -> MethodReport:
    """Ranges from states drawn by NDTC."""
    calls = job.collect(NormalSteps(mean=config.mean), pairs=config.modulation is not None)
    layer = config.static_layer(config.modulation)
    report = job.apply(every_layer(layer, overrides=boundary_overrides(job.model, layer)))
    job.keep_rounding()
    if config.activation_bits is not None:
        job.measure(calls, lambda axis: MSEObserver(axis, trials=config.trials))
    return MethodReport.of(report)
