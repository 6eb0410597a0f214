"""TFMQ-DM: temporal features reconstructed as one unit, with scales for each time step (Huang et al., CVPR 2024)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import nn

from modiff.api import apply, calibrate, collect, reconstruct
from modiff.calibration.data import CalibrationSet, LazyCalls
from modiff.calibration.reconstruct.config import ReconstructConfig
from modiff.calibration.replay import replay
from modiff.calibration.timesteps import EveryStep, UniformGroups
from modiff.config import (
    AttentionConfig,
    JsonConfig,
    LayerConfig,
    ModiffConfig,
    ModulationConfig,
    QuantizerConfig,
    WeightConfig,
    check,
    is_bits,
)
from modiff.methods.parts import boundary_overrides, keep_rounding, plain_network, trajectories_of, undone_on_error
from modiff.methods.temporal import PROJECTION, TemporalBlock
from modiff.methods.tfmq_temporal import reconstruct_temporal
from modiff.methods.work import claim_work
from modiff.model.calibrate import ObserverName
from modiff.model.report import Report


@dataclass(frozen=True, kw_only=True)
class TfmqDmConfig(JsonConfig):
    """TFMQ-DM's settings: 4-bit weights, 8-bit activations, U-Nets only.

    weight_bits, activation_bits: None keeps floats. The first and the last layer have 8 bits in any case.
    sets: which layers have a set of activation scales for each time step. "temporal", the paper's: those of the
        temporal block, whose inputs are a finite set. "all", the released code's: every layer.
    steps: of the sampler. The scales serve these time steps and no others.
    samples: trajectories for activations, all steps of each. batch: at a time.
    groups: of steps whose states weights are learned on (Q-Diffusion: 20 x 256).
    observer: how values become a range; the released code takes "moving_average" (0.95).
    reconstruction: of all blocks but the temporal one; None rounds those to nearest. temporal: of the temporal block.
    modulation: None is the published method; with it, other layers than the temporal ones code residuals.
    attention: quantizers of the products inside attention; None leaves them in full precision.
    seed: of noise and classes.

    The temporal block is learned last and replaces what its layers learned within other units.
    """

    weight_bits: int | None = 4
    activation_bits: int | None = 8
    sets: Literal["temporal", "all"] = "temporal"
    steps: int = 100
    samples: int = 256
    batch: int = 32
    groups: int = 20
    observer: ObserverName = "minmax"
    reconstruction: ReconstructConfig | None = field(default_factory=ReconstructConfig)
    temporal: ReconstructConfig = field(default_factory=ReconstructConfig)
    modulation: ModulationConfig | None = None
    attention: AttentionConfig | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("weight_bits", "activation_bits"):
            check(f"TfmqDmConfig.{name}", getattr(self, name), is_bits(getattr(self, name)), "None or 2 to 8",
                  "TFMQ-DM is made for 4 and 8.")  # fmt: skip
        for name in ("samples", "batch", "steps", "groups"):
            check(f"TfmqDmConfig.{name}", getattr(self, name), getattr(self, name) >= 1, "1 or more", "Less is none.")
        check("TfmqDmConfig.samples", self.samples, self.samples % self.batch == 0, f"a multiple of batch={self.batch}",
              "Trajectories run in batches. Use samples=256, batch=32.")  # fmt: skip
        check("TfmqDmConfig.groups", self.groups, self.groups <= self.steps, f"at most steps={self.steps}",
              "A group has at least one step.")  # fmt: skip

    @classmethod
    def quick(cls) -> Self:
        """For the embedded model and others of its size, in minutes on two cores."""
        learned = ReconstructConfig.quick_weights()
        return cls(steps=50, samples=16, batch=16, groups=10, reconstruction=learned, temporal=learned)

    def layer(self, *, per_step: bool) -> LayerConfig:
        """The config of a layer, with a set of activation scales for each step or one for all."""
        activation = QuantizerConfig(
            bits=self.activation_bits,
            granularity="tensor",
            symmetric=False,
            dynamic=False,
            step_groups=0 if per_step else 1,
        )
        weight = WeightConfig(bits=self.weight_bits, search="mse")
        return LayerConfig(weight=weight, activation=activation, modulation=self.modulation)

    def model_config(self, model: nn.Module) -> ModiffConfig:
        """All layers of a U-Net, those of its temporal block with sets per step and without modulation.

        Raises: ConfigError if it has no temporal block.
        """
        layer = self.layer(per_step=self.sets == "all")
        temporal = dataclasses.replace(self.layer(per_step=True), modulation=None)
        names = TemporalBlock(model).layers
        return ModiffConfig(
            layer=layer,
            exclude=(),
            overrides=boundary_overrides(model, layer) + tuple((name, temporal) for name in names),
            first_last="quantize",
            min_weights=0,
            attention=self.attention,
        )


def apply_tfmq_dm(
    pipe: Any,
    config: TfmqDmConfig | None = None,
    *,
    run: Callable[[int], object] | None = None,
    evaluations_per_run: int | None = None,
    folder: str | Path | None = None,
    progress: bool = True,
) -> Report:
    """Quantize a U-Net pipeline by TFMQ-DM, in place; `modiff.remove(pipe)` undoes it.

    Args:
        pipe: a pipeline with a U-Net, or a U-Net together with `run` and `evaluations_per_run`.
        run: `run(i)` generates the `config.batch` images of trajectory i; needed where the pipeline takes a prompt.
        evaluations_per_run: of the network in a trajectory; asked of the scheduler when None.
        folder: keeps the calibration data and each learned block, so that an interrupted job goes on.
    Returns: what was quantized and what was left.
    Raises: ConfigError, CalibrationError or StateError if the model cannot be calibrated so; it is as before then.
    Cost: `samples` trajectories, block reconstruction of the U-Net on `groups` x `samples` states, and one more
        evaluation of each state.
    """
    config = config or TfmqDmConfig()
    model = plain_network(pipe, "apply_tfmq_dm")
    work = claim_work(folder, pipe, "tfmq_dm", config)
    chosen = config.model_config(model)
    run, steps = trajectories_of(
        pipe, run, evaluations_per_run, steps=config.steps, batch=config.batch, seed=config.seed
    )
    calls = collect(
        pipe,
        run,
        trajectories=config.samples // config.batch,
        batch=config.batch,
        steps=steps,
        sampler=EveryStep(),
        pairs=config.modulation is not None,
        seed=config.seed,
        folder=None if work is None else work / "calls",
        progress=progress,
    )
    report = apply(pipe, chosen)
    with undone_on_error(pipe):
        if config.weight_bits is not None:
            _learn_weights(pipe, model, calls, config, steps, work, progress)
        keep_rounding(model)
        if config.activation_bits is not None:
            calibrate(pipe, lambda: replay(model, calls, progress=progress), observer=config.observer)
    return report


def _learn_weights(
    pipe: Any,
    model: nn.Module,
    calls: CalibrationSet,
    config: TfmqDmConfig,
    steps: int,
    work: Path | None,
    progress: bool,
) -> None:
    """Blocks on groups of steps, then the temporal block on all time steps."""
    if config.reconstruction is not None:
        kept = UniformGroups(groups=min(config.groups, steps)).draw(steps, 1, torch.Generator())
        chosen = [i for i in range(len(calls)) if kept[calls[i].step, 0]]
        # layers of the temporal block are units of their own there, so that no residual block learns them
        blocks = (*config.reconstruction.blocks, f"*{PROJECTION}", "time_embedding")
        reconstruct(
            pipe,
            LazyCalls(chosen, calls.__getitem__),
            dataclasses.replace(config.reconstruction, blocks=blocks),
            folder=None if work is None else work / "blocks",
            progress=progress,
        )
    timesteps = {call.timestep for call in calls if call.timestep is not None}
    reconstruct_temporal(model, sorted(timesteps, reverse=True), config.temporal)
