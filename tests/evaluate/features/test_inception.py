"""Inception-v3: the public layout, its arithmetic against a network written apart, pixels, and wrong files."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from modiff.errors import FormatError
from modiff.evaluate.features import inception as module
from modiff.evaluate.features.inception import Inception, InceptionNetwork, tensorflow_resize
from tests.evaluate.features.images import noise
from tests.reference import metrics as reference
from tests.reference.inception import Inception as Reference


def shapes() -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        state = InceptionNetwork().state_dict()
    return {name: tuple(tensor.shape) for name, tensor in state.items() if "num_batches" not in name}


def drawn() -> dict[str, Tensor]:
    """Weights that keep the size of what passes through."""
    generator = torch.Generator().manual_seed(0)

    def tensor(name: str, shape: tuple[int, ...]) -> Tensor:
        if name.endswith(("running_var", "bn.weight")):
            return torch.rand(shape, generator=generator) + 0.5
        values = torch.randn(shape, generator=generator)
        return values * (2 / values[0].numel()) ** 0.5 if values.ndim > 1 else values * 0.1

    return {name: tensor(name, shape) for name, shape in shapes().items()}


WEIGHTS = drawn()
LAYOUT = {name: torch.zeros(()).expand(shape) for name, shape in shapes().items()}  # small on disk


@pytest.fixture(scope="module")
def extractor(tmp_path_factory: pytest.TempPathFactory) -> Inception:
    path = tmp_path_factory.mktemp("inception") / "drawn.safetensors"
    save_file(WEIGHTS, path)
    return Inception(path)


def test_the_size_is_that_of_the_published_network() -> None:
    with torch.device("meta"):
        network = InceptionNetwork()
    # torch's own Inception-v3 without its auxiliary head has 23 834 568 parameters at 1000 classes
    assert sum(parameter.numel() for parameter in network.parameters()) == 23_834_568 + 8 * 2049
    assert {norm.eps for norm in network.modules() if isinstance(norm, nn.BatchNorm2d)} == {0.001}


def relative(features: Tensor, expected: Tensor) -> float:
    return float((features.double() - expected).norm() / expected.norm())


def test_features_are_those_of_a_network_written_apart(extractor: Inception) -> None:
    images = noise(0, 1, 40, 30, 3)
    features = extractor(images)
    pixels = (tensorflow_resize(images.permute(0, 3, 1, 2).double(), 299) - 128) / 128
    pooled, spatial, logits = Reference(WEIGHTS)(pixels)
    assert relative(features.pooled, pooled) < 1e-5
    assert relative(features.spatial, spatial.flatten(1)) < 1e-5
    assert relative(features.probabilities, logits.softmax(1)) < 1e-4
    assert [tuple(part.shape) for part in features] == [(1, 2048), (1, 2023), (1, 1008)]
    for other in (Reference(WEIGHTS, last_pool="average"), Reference(WEIGHTS, count_padding=True)):
        assert relative(features.pooled, other(pixels)[0]) > 1e-3  # so these weights do tell the variants apart


def test_the_name_carries_the_file_and_a_note_says_that_it_is_not_the_public_one(
    extractor: Inception, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert re.fullmatch("inception-v3:[0-9a-f]{8}:tensorflow", extractor.name)
    assert "not byte for byte the public one" in extractor.note
    monkeypatch.setattr(module, "file_digest", lambda path: module.PUBLIC_SHA256)
    monkeypatch.setattr(module, "load_weights", lambda network, *_: network.to_empty(device="cpu"))
    assert Inception("any").note.startswith("Inception-v3, the public weights file. Images are resized as by Tensor")


def test_a_torch_file_with_counters_and_half_precision_is_the_same_network(tmp_path: Path) -> None:
    counters = {n.replace("running_var", "num_batches_tracked"): torch.tensor(7) for n in WEIGHTS if "var" in n}
    torch.save({**{name: tensor.half() for name, tensor in WEIGHTS.items()}, **counters}, tmp_path / "half.pth")
    state = Inception(tmp_path / "half.pth")._network.state_dict()
    for name, tensor in WEIGHTS.items():
        assert state[name].dtype == torch.float32
        assert torch.equal(state[name], tensor.half().float())


def changed(**parts: Tensor) -> dict[str, Tensor]:
    return {**LAYOUT, **{name.replace("__", "."): tensor for name, tensor in parts.items()}}


IMAGENET = {"fc__weight": torch.zeros(1000, 2048), "fc__bias": torch.zeros(1000)}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (changed(**IMAGENET), r"fc.bias of shape \(1008,\), got \(1000,\) \(2 tensors differ\)"),
        (changed(AuxLogits__fc__weight=torch.zeros(2)), r"AuxLogits.fc.weight of shape none, got \(2,\)"),
        (changed(fc__bias=torch.full((1008,), torch.nan)), "NaN or infinity in fc.bias"),
        ({}, r"got none \(472 tensors differ\). The weights are those of another network"),
        ({"model": 3}, "expected a weights file, got TypeError: dict where names and tensors"),
    ],
)
def test_a_wrong_state_dict_is_refused_with_the_name_of_the_right_file(
    tmp_path: Path, tensors: Any, message: str
) -> None:
    torch.save(tensors, tmp_path / "wrong.pth")
    with pytest.raises(FormatError, match=message) as caught:
        Inception(tmp_path / "wrong.pth")
    assert "pt_inception-2015-12-05-6726825d.pth" in str(caught.value)
    assert "\n" not in str(caught.value)


class Sneaky:
    """Would run code when unpickled."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return print, ("unpickled",)


def test_a_missing_damaged_or_dangerous_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.pth").write_text("not weights")
    (tmp_path / "text.safetensors").write_text("not weights")
    torch.save({"a": Sneaky()}, tmp_path / "sneaky.pth")
    for name in ("none.pth", "text.pth", "text.safetensors", "sneaky.pth"):
        with pytest.raises(FormatError, match=f"{name}: expected a weights file, got ") as caught:
            Inception(tmp_path / name)
        assert "\n" not in str(caught.value)
    assert "unpickled" not in capsys.readouterr().out


@pytest.mark.parametrize(("height", "width", "size"), [(5, 7, 13), (9, 8, 4), (1, 3, 5)])
def test_resizing_agrees_with_a_pixel_at_a_time(height: int, width: int, size: int) -> None:
    image = torch.rand(height, width, dtype=torch.float64)
    expected = torch.from_numpy(reference.tensorflow_resize(image.numpy(), size))
    torch.testing.assert_close(tensorflow_resize(image[None, None], size)[0, 0], expected, rtol=1e-12, atol=1e-12)
