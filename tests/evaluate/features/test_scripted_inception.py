"""A TorchScript Inception: how it is called, and what is none."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from modiff.errors import ConfigError, FormatError
from modiff.evaluate.features.inception import Inception
from modiff.evaluate.features.scripted_inception import ScriptedInception
from tests.evaluate.features.images import noise


class Public(nn.Module):
    """The signature of the public export on a network of two numbers."""

    def __init__(self, features: int = 2048, scale: float = 1.0) -> None:
        super().__init__()
        self.layers = nn.Linear(3, features)
        self.output = nn.Linear(features, 1008)
        self.scale = scale

    def forward(
        self, img: Tensor, return_features: bool = False, use_fp16: bool = False, no_output_bias: bool = False
    ) -> Tensor:
        x = self.layers(img.to(torch.float32).mean(dim=[2, 3]) / 128 - 1)
        if return_features:
            return x
        logits = torch.matmul(x, self.output.weight.t())
        if not no_output_bias:
            logits = logits + 10 * self.output.bias
        return logits.softmax(dim=1) * self.scale


class Plain(nn.Module):
    """A network without the arguments."""

    def forward(self, img: Tensor) -> Tensor:
        return img.to(torch.float32)


def scripted(module: nn.Module, path: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.script(module).save(str(path))
    return path


def test_features_are_the_programs_own_without_the_bias_of_the_logits(tmp_path: Path) -> None:
    network = Public()
    extractor = ScriptedInception(scripted(network, tmp_path / "net.pt"))
    images = noise(0, 3, 9, 7, 3)
    found = extractor(images)
    planes = images.permute(0, 3, 1, 2)
    torch.testing.assert_close(found.pooled, network(planes, return_features=True).detach())
    torch.testing.assert_close(found.probabilities, network(planes, no_output_bias=True).detach())
    assert found.spatial is None
    assert (extractor.dimension, len(extractor.fingerprint)) == (2048, 8)
    assert extractor.name == f"inception-v3:{extractor.fingerprint}:torchscript"
    assert f"TorchScript file of sha256 {extractor.fingerprint}" in extractor.note


def test_grey_images_are_repeated_and_other_images_refused(tmp_path: Path) -> None:
    extractor = ScriptedInception(scripted(Public(), tmp_path / "net.pt"))
    grey = noise(1, 2, 8, 8, 1)
    assert torch.equal(extractor(grey).pooled, extractor(grey.repeat(1, 1, 1, 3)).pooled)
    with pytest.raises(ConfigError, match="ScriptedInception: expected uint8 images"):
        extractor(grey.float())


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Plain(), "with return_features and no_output_bias, got "),
        (Public(features=64), r"got \(1, 64\) and \(1, 1008\)"),
        (Public(scale=2.0), "with a sum of 2"),
    ],
)
def test_another_program_is_refused(tmp_path: Path, module: nn.Module, message: str) -> None:
    with pytest.raises(FormatError, match=message) as caught:
        ScriptedInception(scripted(module, tmp_path / "net.pt"))
    assert "\n" not in str(caught.value)
    assert "inception-2015-12-05.pt" in str(caught.value)


def test_each_kind_of_file_points_to_the_class_that_opens_it(tmp_path: Path) -> None:
    torch.save({"fc.weight": torch.zeros(2)}, tmp_path / "state.pth")
    for name in ("state.pth", "none.pt"):
        with pytest.raises(FormatError, match=r"expected a TorchScript file, got .*which Inception opens") as caught:
            ScriptedInception(tmp_path / name)
        assert "\n" not in str(caught.value)
    with pytest.raises(FormatError, match=r"got a TorchScript file\. .* Open it with ScriptedInception"):
        Inception(scripted(Public(), tmp_path / "net.pt"))
