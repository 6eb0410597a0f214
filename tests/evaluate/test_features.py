"""Extractors: the classifier and Inception-v3 against float64 and a network written apart, and wrong files."""

import json
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from modiff.errors import ConfigError, FormatError
from modiff.evaluate.features import inception as module
from modiff.evaluate.features.classifier import Classifier, ClassifierFeatures, load_classifier, save_classifier
from modiff.evaluate.features.extractor import Features, check_images, joined
from modiff.evaluate.features.inception import Inception, InceptionNetwork, tensorflow_resize
from modiff.evaluate.features.load import load_extractor
from tests.evaluate.fakes import noise
from tests.reference import metrics as reference
from tests.reference.inception import Inception as Reference


def test_the_packages_own_and_a_folder_of_ones_own(tmp_path: Path) -> None:
    extractor = load_extractor("classifier")
    features = extractor(noise(4, 3, 28, 28, 1))
    assert (extractor.name, extractor.dimension) == ("fashion-mnist-classifier", 128)
    assert [tuple(rows.shape) for rows in features] == [(3, 128), (3, 7 * 7 * 7), (3, 10)]
    torch.testing.assert_close(features.probabilities.sum(1), torch.ones(3))
    save_classifier(Classifier(channels=(4, 8), classes=3), tmp_path / "mine")
    extractor = load_extractor(str(tmp_path / "mine"))
    assert (extractor.name.rpartition("-")[0], extractor.dimension) == ("mine", 8)


def test_anything_else_is_named(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="inception: expected 'classifier', a classifier's folder"):
        load_extractor("inception")
    with pytest.raises(FormatError, match=r"config\.json"):
        load_extractor(str(tmp_path))


def test_batches_are_joined_in_order_and_what_one_lacks_is_left_out() -> None:
    rows = torch.arange(12.0).reshape(6, 2)
    parts = [Features(rows[:1], rows[:1] * 2, rows[:1]), Features(rows[1:], rows[1:] * 2, None)]
    features = joined(parts)
    assert torch.equal(features.pooled, rows)
    assert torch.equal(features.spatial, rows * 2)
    assert features.probabilities is None


@pytest.mark.parametrize("shape", [(1, 3, 4, 5), (4, 5, 3), (0, 4, 5, 3), (1, 4, 5, 3)], ids=str)
def test_anything_but_byte_images_is_refused(shape: tuple[int, ...]) -> None:
    images = torch.zeros(shape, dtype=torch.float32 if shape == (1, 4, 5, 3) else torch.uint8)
    with pytest.raises(ConfigError, match=r"here: expected uint8 images \(N, H, W, 1 or 3\), got"):
        check_images(images, "here")


def trained(seed: int = 0, **settings: object) -> Classifier:
    """A classifier whose batch norms have seen data, so that their statistics are not zeros and ones."""
    torch.manual_seed(seed)
    model = Classifier(**{"channels": (4, 6, 8), "classes": 3, **settings})
    for _ in range(3):
        model(torch.randn(16, model.image_channels, 16, 16) * 0.7 + 0.2)
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.uniform_(part.weight, 0.5, 1.5)
            nn.init.uniform_(part.bias, -0.5, 0.5)
    return model.eval()


def classified(
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
    features, logits = classified(model.state_dict(), images, blocks=3, layers=layers)
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


def spoil_config(folder: Path, **fields: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))


DAMAGES = {
    "no config": (lambda f: (f / "config.json").unlink(), "expected the config"),
    "another version": (lambda f: spoil_config(f, format_version=2), "expected the config"),
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
