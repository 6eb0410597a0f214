"""TFMQ-DM: temporal features reconstructed as one unit, with scales for each time step (Huang et al., CVPR 2024)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Self

import torch
from torch import nn

from modiff.calibration.data import CalibrationSet, LazyCalls
from modiff.calibration.reconstruct.config import ReconstructConfig, ReconstructionReport
from modiff.calibration.timesteps import EveryStep, UniformGroups
from modiff.config import ModiffConfig, ModulationConfig
from modiff.methods.recipe import MethodConfig, MethodJob, MethodReport, boundary_overrides, every_layer
from modiff.methods.registry import register
from modiff.methods.temporal import PROJECTION, TemporalBlock, reconstruct_temporal


@dataclass(frozen=True, kw_only=True)
class TfmqDmConfig(MethodConfig):
    """TFMQ-DM's settings: 4-bit weights, 8-bit activations, U-Nets only.

    weight_bits, activation_bits: None keeps floats. The first and the last layer have 8 bits in any case.
    steps: of the sampler. Layers of the temporal block have a set of scales for each of these, and for no others.
    samples: trajectories for activations, all steps of each.
    groups: of steps whose states weights are learned on (Q-Diffusion: 20 x 256).
    reconstruction: of all blocks but the temporal one; None rounds those to nearest. temporal: of the temporal block.
    modulation: None is the published method; with it, other layers than the temporal ones quantize residuals.

    The temporal block is learned last and replaces what its layers learned within other units.
    Cost: `samples` trajectories, block reconstruction of the U-Net on `groups` x `samples` states, and one more
        evaluation of each state.
    """

    weight_bits: int | None = 4
    groups: int = 20
    reconstruction: ReconstructConfig | None = field(default_factory=ReconstructConfig)
    temporal: ReconstructConfig = field(default_factory=ReconstructConfig)
    modulation: ModulationConfig | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_groups(self.groups)

    @classmethod
    def quick(cls) -> Self:
        """For the embedded model and others of its size, in minutes on two cores."""
        learned = ReconstructConfig.quick_weights()
        return cls(steps=50, samples=16, batch=16, groups=10, reconstruction=learned, temporal=learned)

    def model_config(self, model: nn.Module) -> ModiffConfig:
        """All layers of a U-Net, those of its temporal block with sets per step and without modulation.

        Raises: ConfigError if it has no temporal block.
        """
        layer = self.static_layer(self.modulation)
        overrides = tuple((name, self.static_layer(step_groups=0)) for name in TemporalBlock(model).layers)
        return every_layer(layer, overrides=boundary_overrides(model, layer) + overrides)


@register(TfmqDmConfig)
def tfmq_dm(job: MethodJob, config: TfmqDmConfig) -> MethodReport:
    """Blocks on groups of steps, then the temporal block on all time steps, then ranges."""
    chosen = config.model_config(job.model)
    calls = job.collect(EveryStep(), pairs=config.modulation is not None)
    report = job.apply(chosen)
    weights = _learn_weights(job, config, calls) if config.weight_bits is not None else None
    job.keep_rounding()
    if config.activation_bits is not None:
        job.measure(calls)
    return MethodReport.of(report, weights=weights)


def _learn_weights(job: MethodJob, config: TfmqDmConfig, calls: CalibrationSet) -> ReconstructionReport:
    units = ()
    if config.reconstruction is not None:
        groups = UniformGroups(groups=min(config.groups, job.evaluations))
        kept = groups.draw(job.evaluations, 1, torch.Generator())
        chosen = [i for i in range(len(calls)) if kept[calls[i].step, 0]]
        # layers of the temporal block are units of their own there, so that no residual block learns them
        blocks = (*config.reconstruction.blocks, f"*{PROJECTION}", "time_embedding")
        learning = dataclasses.replace(config.reconstruction, blocks=blocks)
        units = job.learn(LazyCalls(chosen, calls.__getitem__), learning, "weights").units
    timesteps = sorted({call.timestep for call in calls if call.timestep is not None}, reverse=True)
    return ReconstructionReport((*units, reconstruct_temporal(job.model, timesteps, config.temporal)))
