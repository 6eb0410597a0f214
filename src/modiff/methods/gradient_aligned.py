"""Gradient-Aligned Calibration: samples weighted so that the gradients of different steps agree (ICLR 2026)."""

import dataclasses
from dataclasses import dataclass, field

from modiff.calibration.reconstruct.config import AlignmentConfig
from modiff.methods.recipe import MethodJob, MethodReport
from modiff.methods.registry import register
from modiff.methods.tfmq_dm import TfmqDmConfig, tfmq_dm


@dataclass(frozen=True, kw_only=True)
class GradientAlignedConfig(TfmqDmConfig):
    """Settings of Gradient-Aligned Calibration: TFMQ-DM's, and how samples are weighed. A reconstruction.

    alignment: temperature 1, five groups of steps and 5 % for validation are the paper's; the number and rate of the
        outer steps are not public. Each block gets weights of its own. Outer rate 0 is TFMQ-DM, to the bit.
    modulation: as in TFMQ-DM; gradients are those of whole inputs, as rounding is learned on them.

    The report tells, for each block, the validation loss and the gradients' mean cosine after the inner step with
    uniform and with learned weights.
    Cost: TFMQ-DM's, and per block a backward pass of its samples and `outer_steps` of those for validation.
    """

    alignment: AlignmentConfig = field(default_factory=AlignmentConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("reconstruction", self.reconstruction is not None, "settings of reconstruction",
                   "Rounding to nearest learns from no sample. Use tfmq_dm.")  # fmt: skip


@register(GradientAlignedConfig)
def gradient_aligned(job: MethodJob, config: GradientAlignedConfig) -> MethodReport:
    """TFMQ-DM with samples weighed for each block."""
    if config.reconstruction is not None:
        learning = dataclasses.replace(config.reconstruction, alignment=config.alignment)
        config = dataclasses.replace(config, reconstruction=learning)
    return tfmq_dm(job, config)
