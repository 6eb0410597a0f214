"""TIAR: round the weights of the temporal block as one unit, over the finite set of time steps (TFMQ-DM)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from modiff.calibration.reconstruct.config import ReconstructConfig, UnitReport
from modiff.calibration.reconstruct.layers import full_precision, without_states
from modiff.calibration.reconstruct.learn import WeightLearner, keep_weight, learn
from modiff.calibration.reconstruct.samples import Batch, UnitCall, UnitData
from modiff.errors import CalibrationError
from modiff.methods.temporal import TemporalBlock
from modiff.model.attach import required_attachment


def reconstruct_temporal(
    model: nn.Module, timesteps: Sequence[float], config: ReconstructConfig | None = None
) -> UnitReport:
    """Learn how the weights of the time MLP and of all embedding projections round, together.

    The loss is the sum over the residual blocks of the squared error of their projected temporal features. It is
    learned and judged on all of `timesteps`: they are all there will ever be.

    Args:
        model: a U-Net with modulated or plain quantized layers.
        timesteps: those of the sampler.
        config: AdaRound's settings; Q-Diffusion's when None.
    Returns: the loss before and after. Rounding to nearest stays where learning did not lower the loss.
    Raises: ConfigError if the network has no such block; CalibrationError if none of its weights is quantized.
    Cost: `config.iterations` passes of the block, a few rows each.
    """
    config = config or ReconstructConfig()
    block = TemporalBlock(model)
    quantized_layers = required_attachment(model, "reconstruct_temporal").layers
    names = [n for n in block.layers if n in quantized_layers and quantized_layers[n].config.weight.bits is not None]
    if not names:
        raise CalibrationError(
            "reconstruct_temporal: expected quantized weights in the temporal block, got none. modiff leaves these "
            "layers alone by default. Apply with ModiffConfig(exclude=())."
        )
    for name in names:
        quantized_layers[name].quantized_weight.unfix()
    device = quantized_layers[names[0]].weight.device
    generator = torch.Generator().manual_seed(config.seed)

    def features(batch: Batch) -> Any:
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
        outcome = learn(features, data, learner, config, generator)
    for name in names if outcome.best is not None else ():
        keep_weight(quantized_layers[name], outcome.best or {}, name)
    return UnitReport(
        name="temporal block",
        kind="TemporalBlock",
        layers=tuple(names),
        before=outcome.before,
        after=outcome.after,
        learned=outcome.best is not None,
        iterations=outcome.iterations,
        reason=outcome.reason,
    )
