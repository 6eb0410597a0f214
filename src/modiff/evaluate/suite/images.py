"""Where the suite's images come from: a pipeline in this process, and files of real images."""

from __future__ import annotations

import functools
import hashlib
import json
import re
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from diffusers import DiffusionPipeline
from PIL import Image

from modiff.errors import FormatError
from modiff.evaluate.cost import trajectory_gbops
from modiff.evaluate.demo import TUNING_SEED
from modiff.evaluate.pipelines import NOTHING, check_pipeline, configured, measure_step
from modiff.evaluate.suite.plans import Plan
from modiff.evaluate.suite.store import DrawnImages
from modiff.generate.job import Conditions
from modiff.generate.samplers import set_scheduler
from modiff.generate.shards import MANIFEST, read_images, to_uint8
from modiff.generate.worker import check_inputs, digest, settings
from modiff.hosts.diffusers.host import denoisers
from modiff.hosts.diffusers.runs import call_inputs, noise_generators

CALIBRATION_IMAGES = 8
CHUNK = 500
"""Real images at a time."""
_PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")


class PipelineSource:
    """A pipeline in this process; image i comes from the noise of seed + i, and of its prompt or class.

    settings: all that shapes the images except the plan, as plain JSON values. shape: (H, W, C) of an image.
    Its layers are as before whenever no plan is open. Cost: two steps of one image, to count its operations and learn
    its shape.
    Args:
        conditions: what the images are drawn of, for a pipeline that takes prompts or classes.
    Raises: ConfigError for a pipeline that needs other inputs, or does not take these conditions.
    """

    def __init__(
        self, pipe: DiffusionPipeline, *, sampler: str = "ddim", seed: int = 0, conditions: Conditions = NOTHING
    ) -> None:
        check_pipeline(pipe, "evaluate", conditions=conditions)
        self.pipe, self.seed, self.conditions = set_scheduler(pipe, sampler), seed, conditions
        self._costs = measure_step(self.pipe, lambda: self.run(1, [0]))
        self.shape: tuple[int, ...] = self.run(1, [0]).shape[1:]
        networks = denoisers(self.pipe)
        self.settings: dict[str, Any] = {
            "pipeline": type(self.pipe).__name__,
            "model": digest(self.pipe),
            "schedule": settings(self.pipe.scheduler),
            "device": str(next(p.device for m in networks.values() for p in m.parameters())),
            "sampler": sampler,
            "seed": seed,
            "prompts": _short(conditions.prompts),
            "labels": _short(conditions.labels),
        }

    def run(self, steps: int, indices: Sequence[int], seed: int | None = None) -> np.ndarray:
        """The images of sample indices in [0, 1], (N, H, W, C); from the noise of `seed` instead of its own."""
        prompts, labels = self.conditions.prompts_of(indices), self.conditions.labels_of(indices)
        inputs = call_inputs(self.pipe, len(indices), prompt=prompts, label=labels)
        noise = noise_generators(self.seed if seed is None else seed, indices)
        return np.asarray(self.pipe(**inputs, num_inference_steps=steps, generator=noise, output_type="np").images)

    @contextmanager
    def open(
        self, plan: Plan, evaluated: Callable[[], object] | None = None
    ) -> Iterator[Callable[[Sequence[int]], DrawnImages]]:
        """Apply the plan's config, and give a function that draws the images of sample indices.

        Static scales are measured first, on noise that no image comes from. evaluated: called after each network call.
        """
        check_inputs(self.pipe, plan.steps, self.conditions)
        others, seed = range(CALIBRATION_IMAGES), self.seed + TUNING_SEED
        calibration = functools.partial(self.run, plan.steps, others, seed)
        with configured(self.pipe, plan.config, calibration=calibration, evaluated=evaluated) as (report, sizes):
            gbops = trajectory_gbops(self._costs, report, plan.steps)

            def draw(indices: Sequence[int]) -> DrawnImages:
                start = time.perf_counter()
                pixels = self.run(plan.steps, indices)
                seconds = time.perf_counter() - start
                images, broken = to_codes(pixels)
                return DrawnImages(images, seconds, sum(sizes.values()), broken, gbops)

            yield draw


def _short(values: Sequence[str] | Sequence[int]) -> str | None:
    """All values if they are few, otherwise their number and a digest; None if there are none."""
    text = ", ".join(map(str, values))
    if len(text) > 80:
        text = f"{len(values)}, sha256 {hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]}"
    return text or None


def to_codes(images: np.ndarray) -> tuple[np.ndarray, int]:
    """(N, H, W, C) in [0, 1] to bytes as `to_uint8` rounds them, and how many images are not finite: NaN becomes 0."""
    broken = int((~np.isfinite(images)).any(axis=(1, 2, 3)).sum())
    return to_uint8(np.nan_to_num(images, nan=0.0)), broken


def read_reference(path: Path) -> Iterator[np.ndarray]:
    """The real images of `path` as uint8 (n, H, W, C), at most CHUNK at a time.

    Args:
        path: an .npz with the images in `arr_0`, or otherwise in its first array; an .npy; a folder of `modiff
            generate`; or one of pictures. Images (N, H, W, C), or grey ones (N, H, W).
    Raises: FormatError if there are none, they are not uint8, or their sizes differ.
    """
    if (path / MANIFEST).is_file():
        yield from read_images(path)
        return
    shape: tuple[int, ...] | None = None
    for file in _files(path):
        images = _read_file(file)
        if shape not in (None, images.shape[1:]):
            raise FormatError(
                f"{file}: expected images of {_size(shape or ())} like those before, got {_size(images.shape[1:])}. "
                "A set has one size. Resize them, or take them out."
            )
        shape = images.shape[1:]
        for first in range(0, len(images), CHUNK):
            yield images[first : first + CHUNK]


def reference_digest(path: Path) -> str:
    """A digest of the images of `read_reference`. Raises: FormatError if there is nothing."""
    digest = hashlib.sha256()
    for images in read_reference(path):
        digest.update(f"{images.shape[1:]}".encode() + images.tobytes())
    return digest.hexdigest()[:16]


def check_reference(path: Path, shape: tuple[int, ...], least: int) -> str:
    """The digest of real images. Raises: FormatError if they are fewer than `least`, or not of `shape`."""
    sizes = [images.shape for images in read_reference(path)]
    if sizes[0][1:] != shape or sum(size[0] for size in sizes) < least:
        raise FormatError(
            f"{path}: expected {least} images or more of {_size(shape)} like those of the model, got "
            f"{sum(size[0] for size in sizes)} of {_size(sizes[0][1:])}. A distance of sets needs a set, and features "
            "change with the size. Give more images, or pad or resize them as the model's training did."
        )
    return reference_digest(path)


def _files(path: Path) -> list[Path]:
    """A file, or the pictures of a folder in the order of their names, numbers by value."""
    if path.is_file():
        return [path]
    inside = sorted(path.iterdir(), key=lambda file: [(0, int(text), "") if text.isdecimal() else (1, 0, text)
                                                      for text in re.split(r"(\d+)", file.name)]
                    ) if path.is_dir() else []  # fmt: skip
    files = [file for file in inside if file.suffix.lower() in _PICTURES and not file.name.startswith(".")]
    if not files:
        raise FormatError(
            f"{path}: expected a file or a folder of pictures ({', '.join(_PICTURES)}), got none there. Give an .npz, "
            "an .npy or the folder that holds the images."
        )
    return files


def _read_file(file: Path) -> np.ndarray:
    try:
        if file.suffix.lower() in _PICTURES:
            with Image.open(file) as picture:
                images = np.asarray(picture if picture.mode == "L" else picture.convert("RGB"))[None]
        else:
            with file.open("rb") as opened:
                images = np.load(opened, allow_pickle=False)
                if not isinstance(images, np.ndarray):
                    images = images["arr_0" if "arr_0" in images.files else images.files[0]]
    except (OSError, ValueError, EOFError, IndexError, zipfile.BadZipFile) as error:
        raise FormatError(
            f"{file}: expected images, got {type(error).__name__}: {error}. The file is damaged or holds something "
            "else. Write it with numpy.save or numpy.savez."
        ) from error
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or not images.size:
        raise FormatError(
            f"{file}: expected uint8 images (N, H, W, C), got {images.dtype} {images.shape}. Values are 0 to 255. "
            "Convert them first, for example numpy.rint(x * 255).astype('uint8')."
        )
    return images if images.ndim == 4 else images[..., None]


def _size(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))
