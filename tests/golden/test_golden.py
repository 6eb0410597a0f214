"""The golden trajectories: the method does what it did; so do checkpoints that the first edition saved.

`first_edition/` is what commit b682d91 saved: a U-Net (W4A8 with a split shortcut), a transformer (tuned W8A4) and a
plain module (W4A8 with static scales). `outputs.safetensors` holds the last sample of each, packed.
"""

from collections.abc import Callable

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import modiff
from modiff.core import jumps
from tests.golden.trajectories import HERE, MODES, NETWORKS, STEPS, record, wave


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("network", NETWORKS)
def test_a_tiny_network_runs_the_trajectory_that_was_recorded(network: str, mode: str) -> None:
    golden = load_file(HERE / f"{network}_{mode}.safetensors")
    now = record(network, mode)
    assert now.keys() == golden.keys()
    for key, value in golden.items():
        # Outputs are float64 (sums of a few hundred products: 1e-12 relative); states are stored in float32 (6e-8).
        bound = (1e-9 if value.dtype == torch.float64 else 2e-7) * float(value.abs().max())
        assert float((now[key] - value).abs().max()) <= bound, key


@pytest.mark.parametrize("network", NETWORKS)
def test_the_recorded_trajectories_of_two_modes_differ(network: str) -> None:
    plain, published = (load_file(HERE / f"{network}_{mode}.safetensors") for mode in ("plain_a4", "published_a4"))
    last = f"{STEPS - 1}.output"
    assert float((plain[last] - published[last]).norm() / plain[last].norm()) > 1e-3


FOLDER = HERE / "first_edition"
OUTPUTS = load_file(FOLDER / "outputs.safetensors")


def check(name: str, model: nn.Module, x: Tensor, evaluate: Callable[[nn.Module, Tensor, int], Tensor]) -> None:
    """The last sample of eight steps from x is the one that was kept."""
    with torch.no_grad(), modiff.trajectory(model):
        for step in range(STEPS):
            output = evaluate(model, x, step)
            x = x - 0.1 * output / output.std()
    torch.testing.assert_close(x, OUTPUTS[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["unet", "dit"])
def test_a_network_saved_by_the_first_edition_samples_what_it_did(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, x, evaluate, _ = NETWORKS[name]()
    monkeypatch.setattr(jumps, "jumped", lambda *_: None)  # a sample jumps in "dit", whose predictor is linear
    check(name, modiff.load(FOLDER / name), x.float(), evaluate)


def test_a_module_with_static_scales_saved_by_the_first_edition_samples_what_it_did() -> None:
    model = nn.Sequential(nn.Linear(8, 32), nn.SiLU(), nn.Linear(32, 32), nn.SiLU(), nn.Linear(32, 8)).eval()
    for index, parameter in enumerate(model.parameters()):
        parameter.data = wave(parameter.shape, index, 0.3).float()
    loaded = modiff.load(FOLDER / "module", into=model)
    check("module", loaded, wave((4, 8), 0.5, 1.0).float(), lambda loaded, y, _: loaded(y))
