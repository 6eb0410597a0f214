"""CLIP score: how well images fit their prompts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.nn import functional

from modiff.errors import ConfigError, FormatError
from modiff.evaluate.features.messages import first_line
from modiff.evaluate.features.optional import optional_import
from modiff.evaluate.features.protocol import check_images

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
"""Of the pixels CLIP was trained on, in [0, 1]."""


class ClipScore:
    """100 max(cos(image, prompt), 0) (Hessel et al. 2021, arXiv:2104.08718, with the usual factor of 100).

    By the package transformers, without torchvision: images are resized here, the shorter side to the model's (bicubic
    with antialiasing, clamped and rounded to bytes), cut to the centre square, and normalised with CLIP's mean and std.
    Prompts longer than the model's 77 tokens are cut.

    Args:
        folder: a local CLIP model with its tokenizer, as transformers saves them; nothing is downloaded.
        device: where it runs.
    Raises: ConfigError if transformers is missing or does not load; FormatError if the folder holds no CLIP model.
    """

    def __init__(self, folder: str | Path, *, device: str | torch.device = "cpu") -> None:
        transformers = optional_import("transformers", "ClipScore")
        path = Path(folder)
        if not (path / "config.json").is_file():
            raise FormatError(
                f"{path}: expected the folder of a CLIP model, got no config.json. Nothing is downloaded. "
                "Download openai/clip-vit-base-patch16 once and give its folder."
            )
        try:
            self._model = transformers.CLIPModel.from_pretrained(path, local_files_only=True, use_safetensors=True)
            self._tokenizer = transformers.CLIPTokenizer.from_pretrained(path, local_files_only=True)
        except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, SafetensorError) as error:
            raise FormatError(
                f"{path}: expected a CLIP model and its tokenizer, got {first_line(error)}. "
                "Files are missing, damaged or of another model. "
                "Download the folder again, with model.safetensors."
            ) from error
        self.name = f"CLIP score({path.resolve().name})"
        self._device = torch.device(device)
        self._model = self._model.to(self._device).eval()
        self._side = int(self._model.config.vision_config.image_size)

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """The score of each image, float32 (N,), 0 to 100.

        Args:
            images: uint8 (N, H, W, C); grey ones are repeated to three channels.
            prompts: N of them.
        Raises: ConfigError for other images, or another number of prompts.
        """
        check_images(images, "ClipScore")
        if len(prompts) != len(images):
            raise ConfigError(
                f"ClipScore: expected a prompt for each of {len(images)} images, got {len(prompts)}. Image i is scored "
                "against prompt i. Give a list of equal length."
            )
        tokens = self._tokenizer(
            list(prompts), padding=True, truncation=True, max_length=self._length(), return_tensors="pt"
        ).to(self._device)
        found = self._model(pixel_values=self._pixels(images), **tokens)
        cosine = functional.cosine_similarity(found.image_embeds, found.text_embeds)
        return (100 * cosine.clamp_min(0)).float().cpu()

    def _length(self) -> int:
        return int(self._model.config.text_config.max_position_embeddings)

    def _pixels(self, images: Tensor) -> Tensor:
        """(N, 3, side, side), normalised."""
        planes = images.to(self._device).permute(0, 3, 1, 2).float().expand(-1, 3, -1, -1)
        height, width = planes.shape[2:]
        short = min(height, width)
        size = (height * self._side // short, width * self._side // short)
        resized = functional.interpolate(planes, size=size, mode="bicubic", antialias=True, align_corners=False)
        top, left = (size[0] - self._side) // 2, (size[1] - self._side) // 2
        square = resized[:, :, top : top + self._side, left : left + self._side].clamp(0, 255).round() / 255
        mean, std = (torch.tensor(values, device=self._device).view(1, 3, 1, 1) for values in (MEAN, STD))
        return (square - mean) / std
