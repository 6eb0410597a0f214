"""Figures for which the extra `eval` is needed: LPIPS to full precision, and how well images fit their prompts."""

import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from modiff.config import check
from modiff.errors import ConfigError
from modiff.evaluate.features.extractor import check_images
from modiff.evaluate.metrics.bootstrap import bootstrap, small_sample_note
from modiff.evaluate.suite.judge import ImageSet, Measurement, measurement
from modiff.files import reading
from modiff.generate.job import Conditions

_BATCH = 64
EXTRAS = ("lpips", "clip")
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""Of the pixels CLIP was trained on, in [0, 1]."""


class Lpips:
    """Mean LPIPS (Zhang et al. 2018, arXiv:1801.03924) of image i to image i of full precision.

    By the package `lpips`, its version 0.1 and AlexNet. It needs torchvision, and downloads the network's weights.
    Raises: ConfigError if lpips or torchvision is missing or does not load.
    """

    name = "LPIPS(alex)"

    def __init__(self, *, device: str = "cpu") -> None:
        optional_import("torchvision", "lpips")  # first: lpips's own error would hide the reason
        self._device = device
        self._model = optional_import("lpips", "lpips").LPIPS(net="alex", version="0.1", verbose=False)
        self._model = self._model.to(device).eval()

    def check(self, shape: tuple[int, int, int]) -> None:
        """At least 32 pixels a side, grey or colour."""
        check_images(torch.zeros(1, *shape, dtype=torch.uint8), "lpips")
        why = "The network halves them five times. Leave lpips out: SSIM and PSNR are always there."
        check("lpips", shape, min(shape[:2]) >= 32, "images of at least 32 pixels a side", why)

    def measure(self, images: ImageSet, full: ImageSet, resamples: int) -> list[Measurement]:
        """One row; none for full precision itself."""
        if images is full:
            return []

        @torch.no_grad()
        def distances(batch: Tensor, indices: slice) -> Tensor:
            reference = torch.from_numpy(full.images[indices])
            first, second = (_planes(each.to(self._device)) / 127.5 - 1 for each in (batch, reference))
            return self._model(first, second).flatten()

        return [_mean_row("lpips", self.name, _by_batch(images.images, distances), resamples,
                          "Image i of both from seed i.")]  # fmt: skip


class Clip:
    """Mean of 100 max(cos(image, prompt), 0) over images and the prompts that they were drawn of (arXiv:2104.08718).

    By the package transformers, without torchvision: images are resized here, the shorter side to the model's (bicubic
    with antialiasing, clamped and rounded to bytes), cut to the centre square, and normalised with CLIP's mean and std.

    Args:
        folder: a local CLIP model with its tokenizer, as transformers saves them; nothing is downloaded.
    Raises: ConfigError if transformers is missing or does not load; FormatError if the folder holds no CLIP model.
    """

    def __init__(self, folder: Path, conditions: Conditions, *, device: str = "cpu") -> None:
        transformers = optional_import("transformers", "clip")
        advice = "Nothing is downloaded: get openai/clip-vit-base-patch16 once, with model.safetensors."
        with reading(folder, "a CLIP model and its tokenizer", advice):
            if not (folder / "config.json").is_file():
                raise FileNotFoundError("no config.json")
            self._model = transformers.CLIPModel.from_pretrained(folder, local_files_only=True, use_safetensors=True)
            self._tokenizer = transformers.CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        self.name = f"CLIP score({folder.resolve().name})"
        self._conditions, self._device = conditions, device
        self._model = self._model.to(device).eval()
        self._side = int(self._model.config.vision_config.image_size)

    def check(self, shape: tuple[int, int, int]) -> None:
        """Any size will do."""

    def measure(self, images: ImageSet, full: ImageSet, resamples: int) -> list[Measurement]:
        """One row, for full precision too: what its score is the others are to be compared with."""
        length = int(self._model.config.text_config.max_position_embeddings)

        @torch.no_grad()
        def scores(batch: Tensor, indices: slice) -> Tensor:
            prompts = self._conditions.of(range(indices.start, indices.start + len(batch)))["prompt"]
            tokens = self._tokenizer(prompts, padding=True, truncation=True, max_length=length, return_tensors="pt")
            output = self._model(pixel_values=self._pixels(batch), **tokens.to(self._device))
            return 100 * functional.cosine_similarity(output.image_embeds, output.text_embeds).clamp_min(0)

        note = "Of each image and its own prompt. No error: compare with full precision's."
        return [_mean_row("clip_score", self.name, _by_batch(images.images, scores), resamples, note)]

    def _pixels(self, images: Tensor) -> Tensor:
        planes = _planes(images.to(self._device))
        height, width = planes.shape[2:]
        short = min(height, width)
        size = (height * self._side // short, width * self._side // short)
        resized = functional.interpolate(planes, size=size, mode="bicubic", antialias=True, align_corners=False)
        top, left = (size[0] - self._side) // 2, (size[1] - self._side) // 2
        square = resized[:, :, top : top + self._side, left : left + self._side].clamp(0, 255).round() / 255
        center, spread = (torch.tensor(values, device=self._device).view(1, 3, 1, 1) for values in (MEAN, STD))
        return (square - center) / spread


Extra = Lpips | Clip
"""A figure that is measured on demand. name: tells network and weights. check: raises ConfigError for images (H, W, C)
that it cannot judge. measure: its rows of a configuration."""


def load_extras(text: str | None, *, clip: Path | None, conditions: Conditions, device: str = "cpu") -> list[Extra]:
    """The figures that `text` names: lpips and clip, between commas; none for None.

    clip: the folder of a CLIP model.
    Raises: ConfigError for another name, a name twice, packages that are missing, clip without its folder or without
        prompts, or a folder without clip; FormatError if the folder holds no CLIP model.
    """
    names = [] if text is None else [name.strip() for name in text.split(",")]
    fits = all(name in EXTRAS and names.count(name) == 1 for name in names)
    why = "All other figures are always there. Use metrics=lpips."
    check("metrics", text, fits, f"{' or '.join(EXTRAS)}, or both between commas", why)
    fits = ("clip" not in names and clip is None) or ("clip" in names and clip is not None and bool(conditions.prompts))
    got = f"metrics={text}, clip={clip} and {len(conditions.prompts)} prompts"
    why = "Images are compared with their prompts. Use metrics=clip, clip=DIR and prompts=FILE."
    check("metrics", got, fits, "`clip` with the folder of a CLIP model, and prompts", why)
    extras: list[Extra] = [Lpips(device=device)] if "lpips" in names else []
    return extras if clip is None else [*extras, Clip(clip, conditions, device=device)]


def optional_import(package: str, where: str) -> ModuleType:
    """The module `package` of the extra `eval`.

    Raises: ConfigError if it is not installed, or installed and broken, as a torchvision built for another torch.
    """
    try:
        return importlib.import_module(package)
    except (ImportError, RuntimeError, OSError, AttributeError) as error:
        raise ConfigError(
            f"{where}: expected the package {package} to load, got {type(error).__name__} ({error}). It is missing, "
            "broken or built for another torch. Type: pip install 'modiff[eval]'. Get torchvision in one command with "
            "torch, from the same package index."
        ) from error


def _planes(images: Tensor) -> Tensor:
    """uint8 (N, H, W, C) to float (N, 3, H, W) in [0, 255]."""
    return images.permute(0, 3, 1, 2).float().expand(-1, 3, -1, -1)


def _by_batch(images: np.ndarray, one: Callable[[Tensor, slice], Tensor]) -> Tensor:
    batches = (slice(first, first + _BATCH) for first in range(0, len(images), _BATCH))
    return torch.cat([one(torch.from_numpy(images[batch]), batch).cpu() for batch in batches]).double()


def _mean_row(name: str, label: str, values: Tensor, resamples: int, note: str) -> Measurement:
    interval = bootstrap(torch.mean, [values], resamples=resamples)
    return measurement(name, label, label, interval["estimate"], len(values), interval,
                       note, small_sample_note("mean", len(values)))  # fmt: skip
