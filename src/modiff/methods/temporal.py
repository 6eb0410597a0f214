"""The temporal block of a U-Net, what depends on the time step alone, rounded as one unit (TFMQ-DM, section 5.5)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from modiff.calibration.blocks import Block
from modiff.calibration.reconstruct.config import ReconstructConfig, UnitReport
from modiff.calibration.reconstruct.layers import full_precision, without_states
from modiff.calibration.reconstruct.learn import WeightLearner, learn, learned_codes
from modiff.calibration.reconstruct.samples import UnitCall, UnitData
from modiff.errors import CalibrationError, ConfigError
from modiff.model.attach import required_attachment

PROJECTION = "time_emb_proj"


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
