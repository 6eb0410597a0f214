"""Generation into a folder: the same image in any batch, nothing drawn twice, nothing mixed, nothing lost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import modiff
from modiff.errors import ConfigError, FormatError, StateError
from modiff.generate.generate import Generated, Request, generate
from tests.pixels import pixel_pipeline

SETTINGS = {"model": "tiny", "config": None}


def run(folder: Path, images: int = 3, batch_size: int = 2, pipe: Any = None, **request: Any) -> Generated:
    pipe = pipe or pixel_pipeline()
    asked = Request(**{"num_images": images, "steps": 2} | request)
    return generate(pipe, asked, folder, settings=SETTINGS, batch_size=batch_size, progress=False)


def pixels(folder: Path) -> dict[str, np.ndarray]:
    return {path.name: np.asarray(Image.open(path)).astype(int) for path in sorted(folder.glob("*.png"))}


def test_files_go_by_index_and_hold_what_the_pipeline_draws_from_that_seed(tmp_path: Path) -> None:
    done = run(tmp_path, seed=5)
    assert [file.name for file in done.files] == ["00000.png", "00001.png", "00002.png"]
    assert done.written == 3
    expected = pixel_pipeline()(
        num_inference_steps=2, generator=torch.Generator().manual_seed(5 + 1), output_type="np"
    ).images[0, ..., 0]
    # rounding to 8 bits, and one code more for a float32 rounding at a tie
    assert np.abs(pixels(tmp_path)["00001.png"] - 255 * expected).max() <= 0.51


@pytest.mark.parametrize("config", [None, modiff.presets.w8a8()])
def test_images_do_not_depend_on_the_batch_size(tmp_path: Path, config: modiff.ModiffConfig | None) -> None:
    found = []
    for batch_size in (1, 3):
        pipe = pixel_pipeline()
        if config is not None:
            modiff.apply(pipe, config)
        run(tmp_path / str(batch_size), batch_size=batch_size, pipe=pipe)
        found.append(pixels(tmp_path / str(batch_size)))
    assert found[0].keys() == found[1].keys()
    # batched kernels sum in another order: a code of 8 bits may flip, in the pixel or in an activation before it
    assert max(np.abs(found[0][name] - found[1][name]).max() for name in found[0]) <= 2
    assert np.abs(found[0]["00000.png"] - found[0]["00001.png"]).max() > 20


class Stopping:
    """A pipeline that is interrupted at its nth call."""

    def __init__(self, calls: int) -> None:
        self.pipe, self.left = pixel_pipeline(), calls
        self.scheduler = self.pipe.scheduler

    def __call__(self, batch_size: int = 1, **options: Any) -> Any:  # the signature is what generate looks at
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return self.pipe(batch_size=batch_size, **dict(options))


def test_an_interrupted_job_goes_on_where_it_stopped(tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    run(whole, images=5)
    halves = tmp_path / "halves"
    with pytest.raises(KeyboardInterrupt):
        run(halves, images=5, pipe=Stopping(1))
    first = {path: path.stat().st_mtime_ns for path in halves.glob("*.png")}
    assert len(first) == 2
    done = run(halves, images=5)
    assert done.written == 3
    assert {path: path.stat().st_mtime_ns for path in first} == first
    for name, image in pixels(whole).items():
        assert np.abs(pixels(halves)[name] - image).max() <= 1, name


def test_more_images_and_another_batch_size_extend_a_folder(tmp_path: Path) -> None:
    run(tmp_path, images=1)
    assert run(tmp_path, images=3, batch_size=1).written == 2
    assert run(tmp_path, images=2).written == 0


@pytest.mark.parametrize("other", [{"seed": 1}, {"steps": 3}])
def test_a_folder_never_mixes_two_settings(tmp_path: Path, other: dict[str, int]) -> None:
    run(tmp_path, images=1)
    before = pixels(tmp_path)
    with pytest.raises(ConfigError, match=f"same settings, got another {next(iter(other))}"):
        run(tmp_path, **other)
    assert pixels(tmp_path).keys() == before.keys()


def test_foreign_images_do_not_count_as_done(tmp_path: Path) -> None:
    (tmp_path / "00000.png").write_bytes(b"holiday")
    with pytest.raises(ConfigError, match=r"got 00000\.png and no settings\.json"):
        run(tmp_path)
    assert (tmp_path / "00000.png").read_bytes() == b"holiday"


@pytest.mark.parametrize("content", ["{", "[1]", "3"])
def test_settings_that_are_damaged_are_an_error(tmp_path: Path, content: str) -> None:
    (tmp_path / "settings.json").write_text(content)
    with pytest.raises(FormatError, match="expected the settings"):
        run(tmp_path)


def test_the_settings_are_kept_beside_the_images(tmp_path: Path) -> None:
    run(tmp_path, images=1, seed=4)
    expected = {"model": "tiny", "config": None, "steps": 2, "seed": 4, "prompt": None, "label": None}
    assert json.loads((tmp_path / "settings.json").read_text()) == expected


def test_pixels_that_are_not_finite_are_an_error_and_no_file(tmp_path: Path) -> None:
    pipe = pixel_pipeline()
    pipe.unet.conv_out.bias.data.fill_(float("nan"))
    with pytest.raises(StateError, match="image 0: expected finite pixels"):
        run(tmp_path, pipe=pipe)
    assert pixels(tmp_path) == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"images": 0}, "--num-images: expected 1 or more, got 0"),
        ({"steps": 0}, "--steps: expected 1 or more, got 0"),
        ({"steps": 1001}, "--steps: expected at most 1000, got 1001"),
        ({"seed": -1}, "--seed: expected 0 or more, got -1"),
        ({"batch_size": 0}, "--batch-size: expected 1 or more, got 0"),
        ({"prompt": "fox"}, "expected no --prompt"),
    ],
)
def test_a_request_that_means_nothing_is_an_error_before_the_folder_is_touched(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        run(tmp_path / "new", **options)
    assert not (tmp_path / "new").exists()
