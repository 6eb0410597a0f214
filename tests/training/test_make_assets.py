"""The assets: the figures of the check, the samples that a restart keeps, and a card that names no folder."""

import json
import shutil

import pytest
import torch
from diffusers import DDIMPipeline
from PIL import Image

from modiff.evaluate.features.classifier import Classifier, load_classifier, save_classifier


@pytest.fixture
def maker(script):
    return script("make_assets")


@pytest.fixture(scope="module")
def made(script, tiny_unet, tmp_path_factory):
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
def inputs(made, images, tmp_path):
    """Options that make assets of a copy of the run and the classifier, which a test may spoil."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    words = f"--run {tmp_path / 'run'} --classifier {tmp_path / 'judge'} --test-images {images} "
    return (words + "--samples 7 --steps 2 --batch 3 --threads 1 --device cpu --seed 5").split()


def test_assets_hold_a_model_its_card_and_the_figures_of_the_check(maker, inputs, tmp_path):
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


def test_an_interrupted_run_goes_on_with_its_samples_and_ends_in_the_same_files(maker, inputs, tmp_path, monkeypatch):
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


def test_a_model_too_large_and_more_samples_than_test_images_are_refused(maker, inputs, tmp_path, monkeypatch):
    monkeypatch.setattr(DDIMPipeline, "__call__", lambda *_, **__: pytest.fail("sampled"))
    words = [*inputs, "-o", str(tmp_path / "assets")]
    with pytest.raises(SystemExit, match="expected at least 13 images, got 12"):
        maker.main([*words, "--samples", "13"])
    for limit in ("most_parameters", "most_bytes"):
        with monkeypatch.context() as patch:
            patch.setitem(maker.DATA, "fashion_mnist", maker.DATA["fashion_mnist"]._replace(**{limit: 1000}))
            with pytest.raises(SystemExit, match="expected at most"):
                maker.main(words)
