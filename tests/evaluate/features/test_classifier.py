"""The classifier as extractor: its own features, the middle maps, any batch, and what it refuses."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from torch import nn

from modiff.errors import ConfigError, FormatError
from modiff.evaluate.classifier import Classifier, save_classifier
from modiff.evaluate.features.classifier import ClassifierFeatures
from tests.evaluate.features.images import noise


def model(**settings: int) -> Classifier:
    made = Classifier(channels=(4, 9, 5), classes=3, **settings)
    for module in made.modules():
        if isinstance(module, nn.BatchNorm2d):  # statistics of their own, so that training mode would show
            nn.init.uniform_(module.running_mean, -1, 1)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return made


def test_rows_are_the_features_and_probabilities_of_images_scaled_as_in_training() -> None:
    network = model(image_channels=3).train()
    images = noise(0, 6, 12, 16, 3)
    found = ClassifierFeatures(network, "test")(images)
    pixels = images.permute(0, 3, 1, 2).float() / 127.5 - 1
    assert float(pixels.min()) >= -1
    assert float(pixels.max()) <= 1
    torch.testing.assert_close(found.pooled, network.eval().features(pixels))
    torch.testing.assert_close(found.probabilities, network(pixels).softmax(1))
    assert found.pooled.dtype == torch.float32
    assert not found.pooled.requires_grad
    assert (found.pooled.shape, found.probabilities.shape) == ((6, 5), (6, 3))


def test_spatial_rows_are_seven_channels_after_the_middle_block() -> None:
    network = model().eval()
    images = noise(1, 2, 12, 16, 1)
    maps = network.blocks[:4](images.permute(0, 3, 1, 2).float() / 127.5 - 1)  # block 1 of 3: conv, pool, norm, ReLU
    found = ClassifierFeatures(network, "test")(images).spatial
    assert maps.shape == (2, 4, 6, 8)
    torch.testing.assert_close(found, maps.flatten(1))
    assert float(found.min()) == 0  # after the ReLU
    wide = Classifier(channels=(3, 9, 5, 5), classes=2)
    assert ClassifierFeatures(wide, "wide")(noise(2, 1, 16, 16, 1)).spatial.shape == (1, 7 * 4 * 4)
    assert ClassifierFeatures(Classifier(channels=(5,), classes=2), "one")(images).spatial.shape == (2, 5 * 12 * 16)


def test_a_row_belongs_to_its_image_in_any_batch_and_no_hook_is_left() -> None:
    network = model()
    extractor = ClassifierFeatures(network, "test")
    images = noise(3, 7, 12, 12, 1)
    whole = extractor(images)
    single = [extractor(images[i : i + 1]) for i in range(7)]
    for part in range(3):
        torch.testing.assert_close(whole[part], torch.cat([rows[part] for rows in single]), rtol=1e-4, atol=1e-5)
    assert sum(len(module._forward_hooks) for module in network.modules()) == 0


def test_the_embedded_one_needs_no_network_and_knows_its_classes() -> None:
    extractor = ClassifierFeatures.embedded()
    found = extractor(noise(4, 3, 28, 28, 1))
    assert (extractor.name, extractor.dimension) == ("fashion-mnist-classifier", 128)
    assert [tuple(part.shape) for part in found] == [(3, 128), (3, 7 * 7 * 7), (3, 10)]
    torch.testing.assert_close(found.probabilities.sum(1), torch.ones(3))


def test_a_saved_one_is_named_after_its_folder_and_its_weights(tmp_path: Path) -> None:
    save_classifier(model(), tmp_path / "birds")
    extractor = ClassifierFeatures.load(tmp_path / "birds")
    digits = hashlib.sha256((tmp_path / "birds" / "model.safetensors").read_bytes()).hexdigest()[:8]
    assert (extractor.name, extractor.dimension) == (f"birds-{digits}", 5)
    with pytest.raises(FormatError, match="classifier folder"):
        ClassifierFeatures.load(tmp_path)


def test_mistakes_are_refused() -> None:
    with pytest.raises(ConfigError, match="expected a name"):
        ClassifierFeatures(model(), "")
    extractor = ClassifierFeatures(model(), "test")
    with pytest.raises(ConfigError, match="test: expected uint8 images"):
        extractor(torch.zeros(1, 12, 12, 1))
    with pytest.raises(ConfigError, match=r"float images \(N, 1, H, W\)"):
        extractor(noise(0, 1, 12, 12, 3))
    with pytest.raises(ConfigError, match="at least 4 pixels"):
        extractor(noise(0, 1, 3, 12, 1))
