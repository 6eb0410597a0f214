"""Channels that dwarf the others of their layer, found in a run: split off, or their layer is left."""

import pytest
import torch
from torch import Tensor, nn

import modiff
from modiff import LayerConfig, ModiffConfig, ModiffWarning, ModulationConfig
from modiff.model.attach import attachment_of
from tests.helpers import drifting, relative_error

LARGE = [3, 10, 41]


class WithOutliers(nn.Module):
    """Reads 48 channels; three may be larger by up to 3.4e8, with weights that are smaller by as much."""

    def __init__(self, kind: str, channels: int = 48) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(channels, 32) if kind == "linear" else nn.Conv2d(channels, 32, 3, padding=1)

    def forward(self, sample: Tensor, timestep: float = 0.0) -> Tensor:
        return self.layer(sample)


def outlying(kind: str) -> tuple[nn.Module, nn.Module, list[Tensor], list[Tensor]]:
    """A network and one without the outlying channels, and their inputs; the largest value is 1.7e9."""
    model, alone = WithOutliers(kind), WithOutliers(kind, 48 - len(LARGE))
    axis, kept = -1 if kind == "linear" else 1, torch.tensor([c for c in range(48) if c not in LARGE])
    factors = torch.ones(48)
    factors[LARGE] = torch.tensor([3.4e8, 1e8, 3e7])
    with torch.no_grad():
        alone.layer.weight.copy_(model.layer.weight[:, kept])
        alone.layer.bias.copy_(model.layer.bias)
        model.layer.weight.div_(factors.reshape(1, -1, *[1] * (model.layer.weight.dim() - 2)))
    shape = (4, 20, 48) if kind == "linear" else (2, 48, 7, 7)
    inputs = [5 * x / x.abs().amax([i for i in range(len(shape)) if i != axis % len(shape)], keepdim=True)
              for x in drifting(0, shape, 6, 0.1, torch.float32)]  # fmt: skip
    scaled = [x * factors.reshape(-1, *[1] * (0 if kind == "linear" else 2)) for x in inputs]
    return model, alone, scaled, [x.index_select(axis, kept) for x in inputs]


def error_of(model: nn.Module, inputs: list[Tensor], expected: list[Tensor]) -> float:
    with torch.no_grad(), modiff.trajectory(model):
        outputs = [model(x, 9.0 - i) for i, x in enumerate(inputs)]
    return relative_error(torch.stack(outputs[1:]), torch.stack(expected[1:]))


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("execution", ["simulated", "integer"])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_channels_that_dwarf_their_layer_are_split_off_and_cost_no_error(kind, execution, plain, tmp_path, monkeypatch):
    monkeypatch.setattr("modiff.errors._WARNED", set())
    model, alone, inputs, kept = outlying(kind)
    layer = LayerConfig(modulation=None if plain else ModulationConfig(), execution=execution)
    config = ModiffConfig(layer=layer, first_last="quantize", default_exclude=())
    with torch.no_grad():
        expected, without = [model(x) for x in inputs], [alone(x) for x in kept]
    modiff.apply(alone, config)
    least = error_of(alone, kept, without)
    modiff.apply(model, config)
    with pytest.warns(ModiffWarning, match=r"layer \(channels reach 1\.7e\+09, the median of the others .*\)"):
        whole = error_of(model, inputs, expected)
    modiff.remove(model)
    report = modiff.apply(model, config, run=lambda: [model(x) for x in inputs])
    assert report.taken[0].reason == "channels split off: 3 dwarf the others"
    assert attachment_of(model).layers["layer"].config.large_channels == tuple(LARGE)
    assert attachment_of(model).layers["layer"].on_integers == (execution == "integer")
    ours = error_of(model, inputs, expected)  # warnings are errors
    assert ours < 1.1 * least
    assert ours < 0.1 * whole
    modiff.save(model, tmp_path / "saved")
    loaded = modiff.load(tmp_path / "saved", into=WithOutliers(kind))
    modiff.pack(model)
    weight, read = outlying(kind)[0].layer.weight.detach(), model.layer.weight
    assert error_of(model, inputs, expected) == error_of(loaded, inputs, expected)
    for columns in (torch.tensor(LARGE), torch.tensor([c for c in range(48) if c not in LARGE])):
        assert relative_error(read.index_select(1, columns), weight.index_select(1, columns)) < 0.01


def test_a_layer_that_cannot_be_split_keeps_its_floats():
    grouped, x = nn.Conv2d(48, 32, 3, groups=2), torch.randn(3, 48, 5, 5)
    x[:, 3] *= 1e9
    both = nn.Sequential(grouped, nn.Conv2d(32, 32, 3))
    with pytest.warns(ModiffWarning, match=r"apply: .* got 0 \(channels reach .* They stay in full precision"):
        report = modiff.apply(both, ModiffConfig(first_last="quantize"), run=lambda: both(x))
    assert [e.name for e in report.taken] == ["1"]
