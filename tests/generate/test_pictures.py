"""A few images into a folder: the same image in any batch, nothing drawn twice, nothing mixed, nothing lost."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import modiff
from modiff.errors import ConfigError
from modiff.generate import pictures
from modiff.generate.conditions import Conditions
from modiff.generate.pictures import Pictures, draw_pictures
from tests.pixels import pixel_pipeline


def run(folder: Path, num_images: int = 3, pipe: Any = None, **options: Any) -> Pictures:
    options = {"steps": 2, "seed": 0, "conditions": Conditions(), "batch_size": 2, "settings": {"model": "m"}} | options
    return draw_pictures(pipe or pixel_pipeline(), folder, num_images=num_images, progress=False, **options)


def pixels(folder: Path) -> dict[str, np.ndarray]:
    return {path.name: np.asarray(Image.open(path)).astype(int) for path in sorted(folder.glob("*.png"))}


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


def test_a_disk_that_fills_up_keeps_the_images_before_and_the_same_command_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path / "whole")
    write, halves = pictures.write_atomically, tmp_path / "halves"

    def full(file: Any) -> None:
        file.write(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(
        pictures, "write_atomically", lambda path, writer: write(path, full if "00001" in path.name else writer)
    )
    with pytest.raises(OSError, match="No space left") as caught:
        run(halves)
    assert caught.value.filename == str(halves / "00001.png")
    monkeypatch.undo()
    assert sorted(path.name for path in halves.glob("[!.]*")) == ["00000.png", "settings.json"]
    assert run(halves).written == 2
    for name, image in pixels(tmp_path / "whole").items():
        assert np.abs(pixels(halves)[name] - image).max() <= 1, name


def test_more_images_and_another_batch_size_extend_a_folder_and_other_settings_are_refused(tmp_path: Path) -> None:
    run(tmp_path, 1, seed=5)
    done = run(tmp_path, 3, batch_size=1, seed=5)
    assert (done.written, [file.name for file in done.files]) == (2, ["00000.png", "00001.png", "00002.png"])
    record = {"model": "m", "steps": 2, "seed": 5, "prompts": None, "labels": None}
    assert json.loads((tmp_path / "settings.json").read_text()) == record
    for other in ("seed", "steps"):
        with pytest.raises(ConfigError, match=f"same job, got one with another {other}"):
            run(tmp_path, 4, **{"seed": 5} | {other: 3})
    (tmp_path / "settings.json").unlink()
    with pytest.raises(ConfigError, match=r"00000\.png alone"):
        run(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_images": 0}, "--num-images: expected 1 or more, got 0"),
        ({"steps": 1001}, "--steps: expected at most 1000, got 1001"),
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
