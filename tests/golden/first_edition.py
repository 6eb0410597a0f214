"""Three small models as the first edition saved them: what `write` wrote at commit b682d91 lies in `first_edition/`.

Weights and inputs are closed formulas. `outputs.safetensors` holds the last sample of a loop of each packed model.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import modiff
from tests.golden import trajectories

FOLDER = Path(__file__).parent / "first_edition"
Evaluate = Callable[[Tensor, int], Tensor]


def sampled(model: nn.Module, x: Tensor, evaluate: Evaluate) -> Tensor:
    """The last sample of eight steps from x."""
    with torch.no_grad(), modiff.trajectory(model):
        for step in range(trajectories.STEPS):
            output = evaluate(x, step)
            x = x - 0.1 * output / output.std()
    return x


def network(name: str) -> tuple[nn.Module, Tensor, Evaluate]:
    """One of the golden networks in float32, its first sample and how it is called."""
    model, x, evaluate, _ = trajectories.NETWORKS[name]()
    return model.float(), x.float(), evaluate


def module() -> tuple[nn.Module, Tensor]:
    """A plain module of torch, and its first sample."""
    model = nn.Sequential(nn.Linear(8, 32), nn.SiLU(), nn.Linear(32, 32), nn.SiLU(), nn.Linear(32, 8)).eval()
    for index, parameter in enumerate(model.parameters()):
        parameter.data = trajectories.wave(parameter.shape, index, 0.3).float()
    return model, trajectories.wave((4, 8), 0.5, 1.0).float()


def write(folder: Path = FOLDER) -> None:
    """Save all three, W4A8 with a split shortcut, tuned W8A4, and W4A8 with static scales, and what they sample."""
    found: dict[str, Tensor] = {}
    for name, config in {"unet": modiff.presets.modulated(4, 8), "dit": modiff.presets.tuned(8, 4)}.items():
        model, x, evaluate = network(name)
        modiff.apply(model, config)
        modiff.save(model, folder / name)
        modiff.pack(model)
        found[name] = sampled(model, x, evaluate).contiguous()
    model, x = module()
    activation = modiff.QuantizerConfig(bits=8, dynamic=False)
    layer = modiff.LayerConfig(weight=modiff.WeightConfig(bits=4), activation=activation)
    modiff.apply(model, modiff.ModiffConfig(layer=layer, first_last="quantize", min_weights=0))
    modiff.calibrate(model, lambda: sampled(model, x, lambda y, _: model(y)))
    modiff.save(model, folder / "module")
    modiff.pack(model)
    found["module"] = sampled(model, x, lambda y, _: model(y)).contiguous()
    save_file(found, folder / "outputs.safetensors")
