"""Assets of the samplers: what comes of finished runs, and that the cards say what was run."""

import json
from typing import Any

import pytest

from modiff.errors import FormatError
from modiff.generate.samplers import UnconditionalPipeline
from modiff.sampling.noise_level import NoiseLevelEstimator


@pytest.fixture(scope="module")
def made(script, ticking, tiny_unet, images, tmp_path_factory):
    """The assets of two short runs."""
    folder = tmp_path_factory.mktemp("assets")
    ticking(script("train_ddm"), tiny_unet, folder / "ddm", 2)
    words = f"--images {images} --size 8 --channels 4,4 --batch 4 --threads 1 --device cpu"
    ticking(script("train_noise_level"), words.split(), folder / "level", 2)
    for _ in range(2):  # the second time over what is there
        script("sampling_assets").main(
            ["--ddm", str(folder / "ddm"), "--noise-level", str(folder / "level"), "--test-images", str(images),
             "-o", str(folder / "out"), "--samples", "4", "--steps", "2"]
        )  # fmt: skip
    return folder / "out"


def test_both_folders_load_and_their_cards_are_filled_in(made):
    assert sorted(path.name for path in made.iterdir()) == ["fashion_mnist_ddm", "fashion_mnist_noise_level"]
    assert UnconditionalPipeline.from_pretrained(made / "fashion_mnist_ddm").scheduler.outputs == 2
    assert NoiseLevelEstimator.from_pretrained(made / "fashion_mnist_noise_level").config.in_channels == 1
    assert (made / "fashion_mnist_ddm" / "samples.png").is_file()
    for name in ("ddm", "noise_level"):
        folder = made / f"fashion_mnist_{name}"
        card, record = (folder / "README.md").read_text(), json.loads((folder / "training.json").read_text())
        assert "$" not in card
        assert f"| images seen | {record['images_seen']}" in card
        assert str(made.parent) not in card + json.dumps(record)


def test_the_error_of_an_estimator_that_always_says_a_half_is_the_distance_to_a_half(script):
    import torch

    class Half:
        def levels(self, noisy: Any) -> Any:
            return torch.full((len(noisy),), 0.5)

    images = torch.zeros(3, 1, 8, 8, dtype=torch.uint8)
    rows = script("sampling_assets").level_errors(Half(), images, 0)
    assert [row["error"] for row in rows] == pytest.approx([abs(row["level"] - 0.5) for row in rows])
    assert {row["mean"] for row in rows} == {0.5}


def test_a_package_without_these_folders_is_named(monkeypatch, tmp_path):
    from modiff import assets

    monkeypatch.setattr(assets, "files", {"modiff.assets": tmp_path}.__getitem__)
    for folder, landmark in ((assets.ddm_folder, "fashion_mnist_ddm/model_index.json"),
                             (assets.noise_level_folder, "fashion_mnist_noise_level/config.json")):  # fmt: skip
        with pytest.raises(FormatError, match=f"expected {landmark} in the package"):
            folder()
