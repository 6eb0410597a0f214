"""The assets: the figures of the check, the samples that a restart keeps, and a card that names no folder."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline
from PIL import Image
from safetensors.torch import load_file

from modiff.assets import model_folder
from modiff.evaluate.features.classifier import Classifier, load_classifier, save_classifier
from modiff.evaluate.features.load import load_extractor
from modiff.hosts.diffusers.load import load_pipeline


@pytest.fixture
def maker(script: Callable[[str], ModuleType]) -> ModuleType:
    return script("make_assets")


@pytest.fixture(scope="module")
def made(script: Callable[[str], ModuleType], tiny_unet: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step in `run`, and in `judge` a classifier that never saw an image."""
    folder = tmp_path_factory.mktemp("made")
    reference = script("train_reference")
    reference.train(reference.parse_arguments([*tiny_unet, "--minutes", "1e-9", "-o", str(folder / "run")]))
    torch.manual_seed(0)
    save_classifier(Classifier(channels=(4, 8), classes=3).eval(), folder / "judge")
    record = {"images": "i.npy", "labels": "l.npy", "test_images": "t.npy", "test_labels": "u.npy", "output": "judge",
              "epochs": 1, "size": 8, "channels": "4,8", "batch": 4, "learning_rate": 0.1, "weight_decay": 0.0,
              "shift": 1, "seed": 0, "test_accuracy": 0.875}  # fmt: skip
    (folder / "judge" / "training.json").write_text(json.dumps(record))
    return folder


@pytest.fixture
def inputs(made: Path, images: Path, tmp_path: Path) -> list[str]:
    """Options that make assets of a copy of the run and the classifier, which a test may spoil."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    words = f"--run {tmp_path / 'run'} --classifier {tmp_path / 'judge'} --test-images {images} "
    return (words + "--samples 7 --steps 2 --batch 3 --threads 1 --device cpu --seed 5").split()


def test_assets_hold_a_model_its_card_and_the_figures_of_the_check(
    maker: ModuleType, inputs: list[str], tmp_path: Path
) -> None:
    output = tmp_path / "assets"
    maker.main([*inputs, "-o", str(output)])
    assert sorted(path.name for path in output.iterdir()) == ["fashion_mnist", "fashion_mnist_classifier"]
    folder = output / "fashion_mnist"
    DDIMPipeline.from_pretrained(folder)
    load_classifier(output / "fashion_mnist_classifier")
    with Image.open(folder / "samples.png") as grid:
        assert grid.size == (8 * 18 + 2, 8 * 18 + 2)
    metrics = json.loads((folder / "metrics.json").read_text())
    assert (metrics["samples"]["count"], metrics["test_images"]["count"]) == (7, 7)
    assert (metrics["steps"], metrics["seed"], metrics["batch"]) == (2, 5, 3)
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlicense: apache-2.0\n")
    assert f"| {metrics['samples']['confident_share']:.3f} | {metrics['test_images']['confident_share']:.3f} |" in card
    assert "87.50% accuracy" in card
    assert "--samples 7 --steps 2 --batch 3 --seed 5" in card
    for path in output.rglob("*"):
        if path.suffix in (".md", ".json"):
            assert str(tmp_path) not in path.read_text()


@pytest.fixture
def colours(script: Callable[[str], ModuleType], maker: ModuleType, tmp_path: Path) -> tuple[list[str], Path]:
    """Options that make assets of a run on colour images, and the folder where run, judge and images lie."""
    random = np.random.default_rng(1)
    np.save(tmp_path / "colours.npy", random.integers(0, 256, (12, 8, 8, 3), dtype=np.uint8))
    np.save(tmp_path / "labels.npy", np.arange(12) % 3)
    colour, label = str(tmp_path / "colours.npy"), str(tmp_path / "labels.npy")
    reference, judge = script("train_reference"), script("train_classifier")
    words = ["--size", "8", "--batch", "4", "--threads", "1", "--device", "cpu"]
    unet = ["--images", colour, "--channels", "16,16", "--attention", "4", "--minutes", "1e-9", "--flip", *words]
    reference.train(reference.parse_arguments([*unet, "-o", str(tmp_path / "run")]))
    data = ["--images", colour, "--labels", label, "--test-images", colour, "--test-labels", label, "--flip"]
    judge.main([*data, *words, "--channels", "4,8", "--layers", "2", "--epochs", "1", "-o", str(tmp_path / "judge")])
    made = ["--data", "cifar10", "--run", str(tmp_path / "run"), "--classifier", str(tmp_path / "judge")]
    made += ["--test-images", colour, "--samples", "10", "--steps", "2", "--batch", "5", "--threads", "1"]
    return [*made, "--device", "cpu", "-o", str(tmp_path / "assets")], tmp_path


def test_the_assets_of_cifar10_are_those_that_the_package_looks_for(
    maker: ModuleType,
    script: Callable[[str], ModuleType],
    colours: tuple[list[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words, folder = colours
    maker.main(words)
    monkeypatch.setattr("modiff.assets.files", {"modiff.assets": folder / "assets"}.__getitem__)
    pipe = load_pipeline("cifar10")
    assert pipe.unet.config.in_channels == 3
    weights = load_file(model_folder("cifar10") / "unet" / "diffusion_pytorch_model.safetensors")
    assert {t.dtype for t in weights.values()} == {torch.float16}
    assert load_extractor("cifar10-classifier").dimension == 8
    card = (model_folder("cifar10") / "README.md").read_text()
    assert "$" not in card
    commands = [line.split() for line in card.splitlines() if line.startswith("python training/")]
    options = [script(Path(c[1]).stem).parse_arguments(c[2:]) for c in commands]
    assert [o.flip for o in options[:2]] == [True, True]
    assert (options[1].layers, options[2].data) == (2, "cifar10")
    metrics = json.loads((model_folder("cifar10") / "metrics.json").read_text())
    assert f"| Frechet distance to the test images | {metrics['frechet_distance']['value']:.3f} | 0 |" in card
    assert (
        f"Frechet distance to as many test images {metrics['frechet_distance']['value']:.3f}" in capsys.readouterr().out
    )


def test_the_commands_in_the_card_are_commands_of_the_scripts(
    maker: ModuleType, script: Callable[[str], ModuleType], inputs: list[str], tmp_path: Path
) -> None:
    record = json.loads((tmp_path / "run" / "training.json").read_text())
    record["calls"].append({**record["calls"][0], "minutes": 2.0, "weighting": "min-snr", "from_image": 1234})
    (tmp_path / "run" / "training.json").write_text(json.dumps(record))
    maker.main([*inputs, "-o", str(tmp_path / "assets")])
    card = (tmp_path / "assets" / "fashion_mnist" / "README.md").read_text()
    assert "| uniform from image 0, then min-snr from image 1,234 |" in card
    commands = [line.split() for line in card.splitlines() if line.startswith("python training/")]
    names = [Path(command[1]).stem for command in commands]
    assert names == ["train_reference", "train_reference", "train_classifier", "make_assets"]
    first, *options = [script(name).parse_arguments(command[2:]) for name, command in zip(names, commands, strict=True)]
    assert (options[0].channels, options[0].batch, options[0].anneal) == ("16,16", 4, 1e-9)
    assert [(o.minutes, o.weighting) for o in (first, options[0])] == [(1e-9, "uniform"), (2.0, "min-snr")]
    assert (options[1].channels, options[1].shift) == ("4,8", 1)
    assert (options[2].run, options[2].classifier) == (options[0].output, options[1].output)


def test_an_interrupted_run_goes_on_with_its_samples_and_ends_in_the_same_files(
    maker: ModuleType, inputs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    maker.main([*inputs, "-o", str(tmp_path / "whole")])
    plain, calls = DDIMPipeline.__call__, []

    def counted(self: DDIMPipeline, *arguments: object, **settings: object) -> object:
        calls.append(arguments[0])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return plain(self, *arguments, **settings)

    monkeypatch.setattr(DDIMPipeline, "__call__", counted)
    with pytest.raises(KeyboardInterrupt):
        maker.main([*inputs, "-o", str(tmp_path / "halves")])
    assert not (tmp_path / "halves" / "fashion_mnist").exists()
    maker.main([*inputs, "-o", str(tmp_path / "halves")])
    assert calls == [3, 3, 3, 1]  # the second was interrupted, the first is not made again
    for name in ("samples.png", "metrics.json", "README.md"):
        files = [tmp_path / run / "fashion_mnist" / name for run in ("whole", "halves")]
        assert files[0].read_bytes() == files[1].read_bytes(), name


def test_new_assets_replace_the_old_ones_and_a_failure_keeps_them(
    maker: ModuleType, inputs: list[str], tmp_path: Path
) -> None:
    output = tmp_path / "assets"
    (output / "fashion_mnist").mkdir(parents=True)
    (output / "fashion_mnist" / "old").write_text("old")
    (tmp_path / "judge" / "model.safetensors").rename(tmp_path / "judge" / "hidden")
    with pytest.raises(SystemExit, match="expected a weights file"):
        maker.main([*inputs, "-o", str(output)])
    assert (output / "fashion_mnist" / "old").exists()
    (tmp_path / "judge" / "hidden").rename(tmp_path / "judge" / "model.safetensors")
    maker.main([*inputs, "-o", str(output)])
    assert not (output / "fashion_mnist" / "old").exists()
    assert (output / "fashion_mnist" / "README.md").exists()
    assert sorted(path.name for path in output.iterdir()) == ["fashion_mnist", "fashion_mnist_classifier"]


class Fixed(torch.nn.Module):
    """Gives the logits it was made with, whatever the images."""

    def __init__(self, logits: list[list[float]]) -> None:
        super().__init__()
        self.logits, self.classes = torch.tensor(logits), len(logits[0])

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.logits[: len(images)]


def test_the_share_counts_confidences_over_nine_tenths_and_the_entropy_is_of_the_classes(maker: ModuleType) -> None:
    nearly, sure = math.log(0.89 / 0.055), math.log(0.91 / 0.045)  # against two logits of 0: softmax 0.89 and 0.91
    model = Fixed([[nearly, 0, 0], [sure, 0, 0], [0, sure, 0], [nearly, 0, 0]])
    judged = maker.judge(model, torch.zeros(4, 1, 8, 8, dtype=torch.uint8))
    assert judged["confident_share"] == 0.5
    assert judged["class_counts"] == [3, 1, 0]
    assert judged["class_entropy_nats"] == pytest.approx(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda p: (p / "run" / "training.json").write_text("{}"), "got one without images"),
        (
            lambda p: (p / "judge" / "training.json").write_text("{"),
            "expected the record of a run, got JSONDecodeError",
        ),
        (
            lambda p: (p / "run/pipeline/unet/diffusion_pytorch_model.safetensors").write_bytes(b"none"),
            "expected a DDIM pipeline folder",
        ),
    ],
    ids=["empty record", "damaged record", "damaged weights"],
)
def test_a_damaged_run_ends_in_one_message(
    maker: ModuleType, inputs: list[str], tmp_path: Path, spoil: Callable[[Path], object], message: str
) -> None:
    spoil(tmp_path)
    with pytest.raises(SystemExit, match=message):
        maker.main([*inputs, "-o", str(tmp_path / "assets")])
    assert not (tmp_path / "assets" / "fashion_mnist").exists()


def test_a_model_too_large_for_the_package_and_more_samples_than_test_images_are_refused(
    maker: ModuleType, inputs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DDIMPipeline, "__call__", lambda *_, **__: pytest.fail("sampled"))
    words = [*inputs, "-o", str(tmp_path / "assets")]
    with pytest.raises(SystemExit, match="expected at least 13 images, got 12"):
        maker.main([*words, "--samples", "13"])
    for limit in ("most_parameters", "most_bytes"):
        with monkeypatch.context() as patch:
            patch.setitem(maker.DATA, "fashion_mnist", maker.DATA["fashion_mnist"]._replace(**{limit: 1000}))
            with pytest.raises(SystemExit, match="expected at most"):
                maker.main(words)
