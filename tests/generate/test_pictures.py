"""A few images into a folder: the same image in any batch, nothing drawn twice, nothing mixed, nothing lost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import modiff
from modiff.errors import ConfigError, StateError
from modiff.generate.conditions import Conditions
from modiff.generate.pictures import Pictures, draw_pictures
from tests.pixels import pixel_pipeline

SETTINGS = {"model": "tiny", "config": None}


def run(folder: Path, num_images: int = 3, pipe: Any = None, **options: Any) -> Pictures:
    options = {"steps": 2, "seed": 0, "conditions": Conditions(), "batch_size": 2} | options
    return draw_pictures(
        pipe or pixel_pipeline(), folder, num_images=num_images, settings=SETTINGS, progress=False, **options
    )


def pixels(folder: Path) -> dict[str, np.ndarray]:
    return {path.name: np.asarray(Image.open(path)).astype(int) for path in sorted(folder.glob("*.png"))}


def test_files_go_by_index_and_hold_what_the_pipeline_draws_from_that_seed(tmp_path: Path) -> None:
    done = run(tmp_path, seed=5)
    assert [file.name for file in done.files] == ["00000.png", "00001.png", "00002.png"]
    assert done.written == 3
    noise = torch.Generator().manual_seed(5 + 1)
    expected = pixel_pipeline()(num_inference_steps=2, generator=noise, output_type="np").images[0, ..., 0]
    # rounding to 8 bits, and one code more for a float32 rounding at a tie
    assert np.abs(pixels(tmp_path)["00001.png"] - 255 * expected).max() <= 0.51
    record = {"model": "tiny", "config": None, "steps": 2, "seed": 5, "prompts": None, "labels": None}
    assert json.loads((tmp_path / "settings.json").read_text()) == record


@pytest.mark.parametrize("config", [None, modiff.presets.w8a8()])
def test_images_do_not_depend_on_the_batch_size(tmp_path: Path, config: modiff.ModiffConfig | None) -> None:
    for batch_size in (1, 3):
        pipe = pixel_pipeline()
        if config is not None:
            modiff.apply(pipe, config)
        run(tmp_path / str(batch_size), batch_size=batch_size, pipe=pipe)
    one, three = (pixels(tmp_path / name) for name in "13")
    # batched kernels sum in another order: a code of 8 bits may flip, in the pixel or in an activation before it
    assert max(np.abs(one[name] - three[name]).max() for name in one) <= 2
    assert np.abs(one["00000.png"] - one["00001.png"]).max() > 20


class Stopping:
    """A pipeline that is interrupted at its nth call."""

    def __init__(self, calls: int) -> None:
        self.pipe, self.left = pixel_pipeline(), calls
        self.scheduler = self.pipe.scheduler

    def __call__(self, batch_size: int = 1, **options: Any) -> Any:  # the signature is what draw_pictures looks at
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return self.pipe(batch_size=batch_size, **dict(options))


def test_an_interrupted_job_goes_on_where_it_stopped(tmp_path: Path) -> None:
    run(tmp_path / "whole", 5)
    halves = tmp_path / "halves"
    with pytest.raises(KeyboardInterrupt):
        run(halves, 5, pipe=Stopping(1))
    first = {path: path.stat().st_mtime_ns for path in halves.glob("*.png")}
    assert len(first) == 2
    assert run(halves, 5).written == 3
    assert {path: path.stat().st_mtime_ns for path in first} == first
    for name, image in pixels(tmp_path / "whole").items():
        assert np.abs(pixels(halves)[name] - image).max() <= 1, name


def test_more_images_and_another_batch_size_extend_a_folder_and_other_settings_are_refused(tmp_path: Path) -> None:
    run(tmp_path, 1)
    assert run(tmp_path, 3, batch_size=1).written == 2
    assert run(tmp_path, 2).written == 0
    for other in ({"seed": 1}, {"steps": 3}):
        with pytest.raises(ConfigError, match=f"same job, got one with another {next(iter(other))}"):
            run(tmp_path, 4, **other)
    assert len(pixels(tmp_path)) == 3


def test_foreign_images_do_not_count_as_done(tmp_path: Path) -> None:
    (tmp_path / "00000.png").write_bytes(b"holiday")
    with pytest.raises(ConfigError, match=r"00000\.png alone"):
        run(tmp_path)
    assert (tmp_path / "00000.png").read_bytes() == b"holiday"


def test_pixels_that_are_not_finite_are_an_error_and_no_file(tmp_path: Path) -> None:
    pipe = pixel_pipeline()
    pipe.unet.conv_out.bias.data.fill_(float("nan"))
    with pytest.raises(StateError, match="image 0: expected finite pixels"):
        run(tmp_path, pipe=pipe)
    assert pixels(tmp_path) == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_images": 0}, "--num-images: expected 1 or more, got 0"),
        ({"steps": 0}, "--steps: expected 1 or more, got 0"),
        ({"steps": 1001}, "--steps: expected at most 1000, got 1001"),
        ({"seed": -1}, "--seed: expected 0 or more, got -1"),
        ({"batch_size": 0}, "--batch-size: expected 1 or more, got 0"),
        ({"conditions": Conditions(prompts=("fox",))}, "expected no --prompt"),
    ],
)
def test_what_means_nothing_is_an_error_before_the_folder_is_touched(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        run(tmp_path / "new", **options)
    assert not (tmp_path / "new").exists()
