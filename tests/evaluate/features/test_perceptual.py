"""LPIPS: how the package is called, and what is said where it is not."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from modiff.errors import ConfigError
from modiff.evaluate.features.perceptual import PerceptualDistance
from tests.evaluate.features.images import noise


class StandIn(nn.Module):
    """The interface of `lpips.LPIPS`: images (N, 3, H, W) in [-1, 1], distances (N, 1, 1, 1)."""

    def __init__(self, net: str, version: str, verbose: bool) -> None:
        super().__init__()
        self.settings = (net, version, verbose)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        assert first.shape[1] == 3
        assert -1 <= float(first.min()) <= float(first.max()) <= 1
        return (first - second).abs().mean(dim=(1, 2, 3), keepdim=True)


@pytest.fixture
def _installed(monkeypatch: pytest.MonkeyPatch) -> None:
    lpips = ModuleType("lpips")
    lpips.LPIPS = StandIn  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lpips", lpips)
    monkeypatch.setitem(sys.modules, "torchvision", ModuleType("torchvision"))


@pytest.mark.usefixtures("_installed")
def test_pairs_are_scaled_and_scored_one_by_one() -> None:
    distance = PerceptualDistance("vgg")
    assert distance.name == "LPIPS(vgg)"
    assert distance._model.settings == ("vgg", "0.1", False)
    black, white = torch.zeros(2, 32, 33, 1, dtype=torch.uint8), torch.full((2, 32, 33, 1), 255, dtype=torch.uint8)
    white[1] = 0
    assert distance(black, white).tolist() == [2, 0]
    colour = noise(0, 3, 32, 32, 3)
    assert distance(colour, colour).tolist() == [0, 0, 0]


@pytest.mark.usefixtures("_installed")
@pytest.mark.parametrize(
    ("images", "reference", "message"),
    [
        (torch.zeros(1, 32, 32, 3), torch.zeros(1, 32, 32, 3), "uint8"),
        (noise(0, 2, 32, 32, 3), noise(0, 1, 32, 32, 3), "two equal shapes"),
        (noise(0, 1, 28, 28, 3), noise(0, 1, 28, 28, 3), "at least 32 pixels"),
    ],
)
def test_mistakes_are_refused(images: Tensor, reference: Tensor, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PerceptualDistance()(images, reference)


def test_without_the_packages_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)  # as if not installed
    with pytest.raises(ConfigError, match=r"PerceptualDistance: expected .*torchvision"):
        PerceptualDistance()
    monkeypatch.setitem(sys.modules, "torchvision", ModuleType("torchvision"))
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(ConfigError, match=r"PerceptualDistance: expected .*lpips.* pip install 'modiff\[eval\]'"):
        PerceptualDistance()


def test_another_network_is_refused_first() -> None:
    unknown: Any = "resnet"
    with pytest.raises(ConfigError, match="got 'resnet'"):
        PerceptualDistance(unknown)
