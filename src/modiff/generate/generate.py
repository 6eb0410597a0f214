"""Generate images into a folder: batch by batch, each file whole, taken up again where it stopped."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from diffusers import DiffusionPipeline
from tqdm import tqdm

from modiff.errors import ConfigError, FormatError
from modiff.files import check_writable, write_atomically, write_json
from modiff.generate.conditions import Conditions
from modiff.generate.draw import check_finite, check_steps, draw
from modiff.generate.grid import to_picture
from modiff.generate.job import check_counts
from modiff.hosts.diffusers.runs import call_inputs

SETTINGS = "settings.json"


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to draw. prompt and label are for pipelines that take them."""

    num_images: int = 8
    steps: int = 50
    seed: int = 0
    prompt: str | None = None
    label: int | None = None

    def __post_init__(self) -> None:
        check_counts({"--num-images": self.num_images, "--steps": self.steps}, self.seed)


@dataclass(frozen=True)
class Generated:
    """files: all images in order. written: how many of them now. seconds: wall time of these."""

    files: tuple[Path, ...]
    written: int
    seconds: float


def generate(
    pipe: DiffusionPipeline,
    request: Request,
    folder: Path,
    *,
    settings: dict[str, Any],
    batch_size: int = 8,
    progress: bool = True,
) -> Generated:
    """Write 00000.png, 00001.png, ... to `folder`; those that are there already are kept and not drawn again.

    Image i comes from the noise of seed + i, so it is the same whatever the batch size, up to float rounding.

    Args:
        settings: what else shapes the images (model, config, ...): kept in settings.json with the request, so that a
            folder never mixes two. Plain JSON values.
    Raises: ConfigError for inputs the pipeline cannot take, or a folder made with other settings; StateError for pixels
        that are not finite; OSError that names the file, if one cannot be written. Images written before are kept.
    """
    check_counts({"--batch-size": batch_size}, request.seed)
    call_inputs(pipe, 1, prompt=request.prompt, label=request.label)
    check_steps(pipe, request.steps)
    files = [folder / f"{index:05d}.png" for index in range(request.num_images)]
    shaping = {"steps": request.steps, "seed": request.seed, "prompt": request.prompt, "label": request.label}
    _claim(folder, settings | shaping)
    conditions = Conditions(
        prompts=() if request.prompt is None else (request.prompt,),
        labels=() if request.label is None else (request.label,),
    )
    missing = [index for index, file in enumerate(files) if not file.is_file()]
    start = time.perf_counter()
    with tqdm(total=len(files), initial=len(files) - len(missing), unit="image", disable=not progress) as bar:
        for first in range(0, len(missing), batch_size):
            indices = missing[first : first + batch_size]
            images = draw(pipe, indices, steps=request.steps, seed=request.seed, conditions=conditions)
            check_finite(images, indices[0])
            for index, image in zip(indices, images, strict=True):
                _save(files[index], image)
                bar.update()
    return Generated(tuple(files), len(missing), time.perf_counter() - start)


def _save(path: Path, image: np.ndarray) -> None:
    write_atomically(path, lambda file: to_picture(image).save(file, format="PNG"))


def _claim(folder: Path, settings: dict[str, Any]) -> None:
    """Make the folder this job's, or find that it is."""
    record = folder / SETTINGS
    check_writable(record)
    if not record.is_file():
        foreign = sorted(folder.glob("[0-9]" * 5 + ".png"))
        if foreign:
            raise ConfigError(
                f"{folder}: expected a folder without images, got {foreign[0].name} and no {SETTINGS}. These images "
                "would count as done. Give another folder."
            )
        write_json(record, settings)
        return
    try:
        past = dict(json.loads(record.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise FormatError(
            f"{record}: expected the settings that the images were made with, got {error}. Nothing can be added to "
            "them. Give another folder."
        ) from error
    wanted = json.loads(json.dumps(settings))
    differing = sorted(key for key in {*wanted, *past} if wanted.get(key) != past.get(key))
    if differing:
        raise ConfigError(
            f"{folder}: expected a folder with the same settings, got another {' and '.join(differing)}. Its images do "
            "not belong to this job. Give another folder, or the settings that it began with."
        )
