"""The classifier: what it computes, what its folder holds, its features, and what it refuses."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from modiff.errors import ConfigError, FormatError
from modiff.evaluate.features.classifier import Classifier, ClassifierFeatures, load_classifier, save_classifier
from tests.evaluate.features.images import noise


def trained(seed: int = 0, **settings: object) -> Classifier:
    """A classifier whose batch norms have seen data, so that their statistics are not zeros and ones."""
    torch.manual_seed(seed)
    model = Classifier(**{"channels": (4, 6, 8), "classes": 3, **settings})
    for _ in range(3):
        model(torch.randn(16, model.image_channels, 16, 16) * 0.7 + 0.2)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    return model.eval()


def reference(
    weights: dict[str, torch.Tensor], images: torch.Tensor, blocks: int, layers: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """Features and logits in float64: convolution, 2x2 maximum (not in the last block), normalisation, ReLU."""
    convolutions = [w for w in weights.values() if w.ndim == 4]
    norms = [
        tuple(weights[f"{name.removesuffix('running_mean')}{field}"].double()
              for field in ("running_mean", "running_var", "weight", "bias"))
        for name in weights if name.endswith("running_mean")
    ]  # fmt: skip
    x = images.double()
    for index, (w, (mean, variance, gain, offset)) in enumerate(zip(convolutions, norms, strict=True)):
        patches = nn.functional.pad(x, (1, 1, 1, 1)).unfold(2, 3, 1).unfold(3, 3, 1)
        x = torch.einsum("nchwij,ocij->nohw", patches, w.double())
        if index % layers == layers - 1 and index < blocks * layers - 1:
            n, c, h, _ = x.shape
            x = x.reshape(n, c, h // 2, 2, h // 2, 2).amax(dim=(3, 5))
        x = (x - mean[:, None, None]) / (variance[:, None, None] + 1e-5).sqrt() * gain[:, None, None]
        x = (x + offset[:, None, None]).clamp(min=0)
    assert len(convolutions) == blocks * layers
    features = x.flatten(2).mean(-1)
    return features, features @ weights["head.weight"].double().T + weights["head.bias"].double()


@pytest.mark.parametrize(("image_channels", "layers"), [(1, 1), (3, 1), (3, 2)])
def test_features_and_logits_equal_a_float64_reference(image_channels: int, layers: int) -> None:
    model = trained(image_channels=image_channels, layers=layers).double()
    images = torch.randn(5, image_channels, 16, 16, dtype=torch.float64)
    features, logits = reference(model.state_dict(), images, blocks=3, layers=layers)
    # Both are float64: they differ by the order of a few hundred additions of numbers near one.
    torch.testing.assert_close(model.features(images), features, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(model(images), logits, rtol=1e-12, atol=1e-12)
    assert features.std() > 1e-2


def test_a_saved_classifier_loads_as_its_float16_rounding_in_float32(tmp_path: Path) -> None:
    model = trained()
    save_classifier(model, tmp_path)
    loaded = load_classifier(tmp_path)
    assert (loaded.channels, loaded.image_channels, loaded.classes) == ((4, 6, 8), 1, 3)
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    floats = {name: tensor for name, tensor in loaded.state_dict().items() if tensor.is_floating_point()}
    for name, tensor in floats.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, model.state_dict()[name].half().float()), name


@pytest.mark.parametrize("shape", [(1, 3, 16, 16), (1, 16, 16), (1, 1, 16, 3), (1, 1, 16, 16)], ids=str)
def test_images_of_another_kind_are_refused(shape: tuple[int, ...]) -> None:
    images = torch.zeros(shape, dtype=torch.uint8 if shape == (1, 1, 16, 16) else torch.float32)
    with pytest.raises(ConfigError, match=r"expected float images \(N, 1, H, W\)"):
        trained()(images)


def spoil_config(folder: Path, **fields: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))


DAMAGES = {
    "no config": (lambda f: (f / "config.json").unlink(), "expected the config"),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), "expected the config"),
    "another version": (lambda f: spoil_config(f, format_version=2), "expected the config"),
    "channels are no list": (lambda f: spoil_config(f, channels=5), "expected the config"),
    "config of other channels": (lambda f: spoil_config(f, channels=[4, 6, 9]), "tensors differ"),
    "weights are a pickle": (
        lambda f: (f / "model.safetensors").write_bytes(pickle.dumps({"head.bias": [0.0]})), "expected a weights file"
    ),
    "NaN in the weights": (
        lambda f: save_file(
            {**load_file(f / "model.safetensors"), "head.bias": torch.full((3,), torch.nan)}, f / "model.safetensors"
        ),
        "expected finite",
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_refused_with_its_path(tmp_path: Path, damage: str) -> None:
    spoil, message = DAMAGES[damage]
    save_classifier(trained(), tmp_path)
    spoil(tmp_path)
    with pytest.raises(FormatError, match=message) as caught:
        load_classifier(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_weights_that_are_not_finite_are_not_saved_over_good_ones(tmp_path: Path) -> None:
    model = trained()
    save_classifier(model, tmp_path)
    good = (tmp_path / "model.safetensors").read_bytes()
    nn.init.constant_(model.head.bias, 1e6)  # too large for float16
    with pytest.raises(FormatError, match=r"NaN or infinity in head\.bias"):
        save_classifier(model, tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == good


def test_rows_are_the_features_and_probabilities_of_images_scaled_as_in_training() -> None:
    network = trained(image_channels=3).train()
    images = noise(0, 6, 12, 16, 3)
    features = ClassifierFeatures(network, "test")(images)
    pixels = images.permute(0, 3, 1, 2).float() / 127.5 - 1
    torch.testing.assert_close(features.pooled, network.eval().features(pixels))
    torch.testing.assert_close(features.probabilities, network(pixels).softmax(1))
    assert (features.pooled.dtype, features.pooled.requires_grad) == (torch.float32, False)
    assert (features.pooled.shape, features.probabilities.shape) == ((6, 8), (6, 3))


def test_spatial_rows_are_seven_channels_after_the_middle_block() -> None:
    network = trained(channels=(4, 9, 5))
    images = noise(1, 2, 12, 16, 1)
    maps = network.blocks[:4](images.permute(0, 3, 1, 2).float() / 127.5 - 1)  # block 1 of 3: conv, pool, norm, ReLU
    features = ClassifierFeatures(network, "test")(images).spatial
    assert maps.shape == (2, 4, 6, 8)
    torch.testing.assert_close(features, maps.flatten(1))
    assert float(features.min()) == 0  # after the ReLU
    wide = Classifier(channels=(3, 9, 5, 5), classes=2)
    assert ClassifierFeatures(wide, "wide")(noise(2, 1, 16, 16, 1)).spatial.shape == (1, 7 * 4 * 4)
    assert ClassifierFeatures(Classifier(channels=(5,), classes=2), "one")(images).spatial.shape == (2, 5 * 12 * 16)
