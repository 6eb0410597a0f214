"""A few images as PNG files in a folder: batch by batch, each file whole, resumed where it stopped."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, NamedTuple

from diffusers import DiffusionPipeline
from tqdm import tqdm

from modiff.files import ResumableFolder, check_writable, write_atomically
from modiff.generate.conditions import Conditions
from modiff.generate.grid import to_picture
from modiff.generate.job import check_counts
from modiff.generate.worker import check_inputs, draw

SETTINGS = "settings.json"


class Pictures(NamedTuple):
    """files: all images in order. written: how many of them now. seconds: wall time of these."""

    files: tuple[Path, ...]
    written: int
    seconds: float


def draw_pictures(
    pipe: DiffusionPipeline,
    folder: Path,
    *,
    num_images: int,
    steps: int,
    seed: int,
    conditions: Conditions,
    settings: dict[str, Any],
    batch_size: int = 8,
    progress: bool = True,
) -> Pictures:
    """Write 00000.png, 00001.png, ... to `folder`; those that are there already are kept and not drawn again.

    Image i comes from the noise of seed + i, so it is the same whatever the batch size, up to float rounding.

    Args:
        settings: what else shapes the images (model, config, ...), as JSON values; a folder never mixes two.
    Raises: ConfigError for inputs the pipeline cannot take, or a folder made with other settings; StateError for pixels
        that are not finite; OSError that names the file, if one cannot be written. Images written before are kept.
    """
    check_counts({"--num-images": num_images, "--steps": steps, "--batch-size": batch_size}, seed)
    check_inputs(pipe, steps, conditions)
    files = [folder / f"{index:05d}.png" for index in range(num_images)]
    job = settings | {"steps": steps, "seed": seed} | conditions.to_dict()
    check_writable(folder / SETTINGS)
    start = time.perf_counter()
    with ResumableFolder(folder, job, record=SETTINGS, items="[0-9]" * 5 + ".png"):
        missing = [index for index, file in enumerate(files) if not file.is_file()]
        with tqdm(total=len(files), initial=len(files) - len(missing), unit="image", disable=not progress) as bar:
            for first in range(0, len(missing), batch_size):
                indices = missing[first : first + batch_size]
                images = draw(pipe, indices, steps=steps, seed=seed, conditions=conditions)
                for index, image in zip(indices, images, strict=True):
                    picture = to_picture(image)
                    write_atomically(files[index], lambda file, picture=picture: picture.save(file, format="PNG"))
                    bar.update()
    return Pictures(tuple(files), len(missing), time.perf_counter() - start)
