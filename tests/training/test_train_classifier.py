"""The training of the classifier: it learns what can be learned, records what it measured, and refuses wrong labels."""

import json

import numpy as np
import pytest
import torch

from modiff.evaluate.features.classifier import load_classifier


@pytest.fixture
def trainer(script):
    return script("train_classifier")


@pytest.fixture
def stripes(tmp_path):
    """Four classes told apart by the direction and the width of their stripes, under noise, in the options' words."""
    random = np.random.default_rng(0)
    words = []
    for split, count in (("", 400), ("test-", 100)):
        labels = random.integers(0, 4, count)
        ramp = np.arange(8)
        wave = np.sin(2 * np.pi * ramp / np.where(labels % 2, 2.5, 6)[:, None] + random.uniform(0, 6, (count, 1)))
        clean = np.where((labels < 2)[:, None, None], wave[:, :, None], wave[:, None, :]) * np.ones((8, 8))
        noisy = clean * 80 + 128 + random.normal(0, 20, clean.shape)
        for name, array in (("images", noisy.clip(0, 255).astype(np.uint8)), ("labels", labels)):
            path = tmp_path / f"{split}{name}.npy"
            np.save(path, array)
            words += [f"--{split}{name}", str(path)]
    return [*words, "--size", "8", "--channels", "8,16", "--batch", "40", "--threads", "1", "--epochs", "8"]


def test_a_classifier_learns_to_tell_stripes_and_records_its_accuracy(trainer, stripes, tmp_path):
    trainer.main([*stripes, "-o", str(tmp_path / "out")])
    model = load_classifier(tmp_path / "out")
    images = torch.from_numpy(np.load(tmp_path / "test-images.npy"))[:, None].double() / 255 * 2 - 1
    labels = torch.from_numpy(np.load(tmp_path / "test-labels.npy"))
    confidence = model.double()(images).softmax(-1)
    accuracy = (confidence.argmax(-1) == labels).double().mean().item()
    text = (tmp_path / "out" / "training.json").read_text()
    record = json.loads(text)
    assert accuracy > 0.9  # chance is 0.25
    assert record["test_accuracy"] == pytest.approx(accuracy)
    assert record["test_confident_share"] == pytest.approx(
        (confidence.amax(-1) > 0.9).double().mean().item(), abs=0.0101
    )
    assert (record["images_seen"], record["images"], record["output"]) == (3200, "images.npy", "out")
    assert str(tmp_path) not in text
    assert model.classes == 4


def test_random_flips_mirror_some_images_whole_and_deeper_classifiers_train(trainer, stripes, tmp_path):
    torch.manual_seed(0)
    images = torch.arange(40 * 2 * 3 * 4).reshape(40, 2, 3, 4)
    flipped = trainer.flip_at_random(images)
    mirrored = [torch.equal(new, old.flip(2)) for new, old in zip(flipped, images, strict=True)]
    same = [torch.equal(new, old) for new, old in zip(flipped, images, strict=True)]
    assert all(a != b for a, b in zip(mirrored, same, strict=True))
    assert 10 < sum(mirrored) < 30
    trainer.main([*stripes, "--flip", "--layers", "2", "-o", str(tmp_path / "deep")])
    assert load_classifier(tmp_path / "deep").layers == 2
    assert json.loads((tmp_path / "deep" / "training.json").read_text())["test_accuracy"] > 0.9
