"""TFMQ-DM: temporal features reconstructed as one unit, with scales for each time step (Huang et al., CVPR 2024)."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from glob import escape
from typing import Any, Self

import torch
from torch import Tensor, nn

from modiff.calibration.blocks import Block
from modiff.calibration.data import CalibrationSet, LazyCalls
from modiff.calibration.reconstruct.config import ReconstructConfig, ReconstructionReport, UnitReport
from modiff.calibration.reconstruct.layers import full_precision, without_states
from modiff.calibration.reconstruct.learn import WeightLearner, learn, learned_codes
from modiff.calibration.reconstruct.samples import UnitCall, UnitData
from modiff.calibration.timesteps import EveryStep, UniformGroups
from modiff.config import ModiffConfig, ModulationConfig
from modiff.errors import CalibrationError, ConfigError
from modiff.methods.recipe import MethodConfig, MethodJob, MethodReport, boundary_overrides, every_layer
from modiff.methods.registry import register
from modiff.model.attach import required_attachment

PROJECTION = "time_emb_proj"


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
        overrides = tuple((escape(name), self.static_layer(step_groups=0)) for name in TemporalBlock(model).layers)
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


class TemporalBlock:
    """The time MLP and the projection of its output in each residual block, as one function of the time step.

    Raises: ConfigError if the network is no U-Net of diffusers, or its embedding depends on more than the time step.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model
        self.projections = tuple(n for n, _ in model.named_modules() if n.rpartition(".")[2] == PROJECTION)
        known = (getattr(model, name, None) for name in ("time_proj", "time_embedding"))
        if not self.projections or not all(isinstance(module, nn.Module) for module in known):
            raise ConfigError(
                f"{type(model).__name__}: expected a U-Net with time_embedding and {PROJECTION} layers, got none. "
                "TFMQ-DM reconstructs the layers that read the time step alone. Use another method for transformers."
            )
        for name in ("class_embedding", "add_embedding"):
            if getattr(model, name, None) is not None:
                raise ConfigError(
                    f"{type(model).__name__}: expected an embedding of the time step alone, got one with {name}. Its "
                    "temporal features are no finite set. Use another method for this network."
                )
        mlp = self.model.time_embedding.named_modules(prefix="time_embedding")
        self.layers = tuple(name for name, module in mlp if isinstance(module, nn.Linear)) + self.projections
        """Names of the linear layers of the block, in the order in which they run."""

    def __call__(self, timesteps: Tensor) -> tuple[Tensor, ...]:
        """The projected temporal features (n, C_i) of each residual block, for time steps (n,)."""
        weight = self.model.get_submodule(self.projections[0]).weight
        dtype = weight.dtype if weight.is_floating_point() else torch.float32
        embedded = self.model.time_embedding(self.model.time_proj(timesteps).to(dtype))
        if getattr(self.model, "time_embed_act", None) is not None:
            embedded = self.model.time_embed_act(embedded)
        resnets = [self.model.get_submodule(name.rpartition(".")[0]) for name in self.projections]
        inputs = (embedded if resnet.skip_time_act else resnet.nonlinearity(embedded) for resnet in resnets)
        return tuple(resnet.time_emb_proj(x) for resnet, x in zip(resnets, inputs, strict=True))


def reconstruct_temporal(model: nn.Module, timesteps: Sequence[float], config: ReconstructConfig) -> UnitReport:
    """Learn how the weights of the time MLP and of all embedding projections round, together.

    The loss is the sum over the residual blocks of the squared error of their projected temporal features, learned and
    judged on all `timesteps` of the sampler. Rounding to nearest stays where learning did not lower the loss.
    Raises: ConfigError if the network has no such block; CalibrationError if no weight of it is quantized.
    """
    block = TemporalBlock(model)
    quantized_layers = required_attachment(model, "reconstruct_temporal").layers
    names = [n for n in block.layers if n in quantized_layers and quantized_layers[n].config.weight.bits is not None]
    if not names:
        raise CalibrationError(
            "reconstruct_temporal: expected quantized weights in the temporal block, got none. modiff leaves these "
            "layers alone by default. Apply with ModiffConfig(default_exclude=())."
        )
    for name in names:
        quantized_layers[name].quantized_weight.unfix()
    device = quantized_layers[names[0]].weight.device
    generator = torch.Generator().manual_seed(config.seed)

    def features(batch: UnitCall) -> Any:
        return block(batch.args[0])

    with torch.inference_mode(False), full_precision(model), torch.no_grad():
        points = [torch.tensor([t], device=device) for t in timesteps]
        calls = [UnitCall((t,), {}, [f.detach().clone() for f in block(t)]) for t in points]
        data = UnitData(
            calls, features, device=device, held_out=config.held_out, generator=generator, name="temporal block"
        )
    data.held = data.training = [*data.held, *data.training]
    with without_states(model, "full_precision") as trainees:
        learner = WeightLearner({name: trainees[name] for name in names}, config)
        best, report = learn(
            Block("temporal block", "TemporalBlock", tuple(names)), features, data, learner, config, generator
        )
    for name in names if best else ():
        quantized_layers[name].quantized_weight.fix(learned_codes(best or {}, name))
    return report
