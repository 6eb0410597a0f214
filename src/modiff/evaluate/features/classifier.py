"""Features of the classifier that comes with the package: offline, small, and of one data set only."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from modiff.assets import EMBEDDED, classifier_folder
from modiff.errors import ConfigError
from modiff.evaluate.classifier import WEIGHTS, Classifier, load_classifier
from modiff.evaluate.features.inception import fingerprint
from modiff.evaluate.features.protocol import Features, check_images
from modiff.evaluate.metrics.frechet import spatial_rows


class ClassifierFeatures:
    """A `Classifier` as feature extractor.

    pooled: what its last layer sees, D = its last channel count. probabilities: softmax of its logits.
    spatial: `spatial_rows` of the maps in the middle of the network, after block max(1, number of blocks // 2) and its
    ReLU; 7 x 7 x 7 = 343 numbers for the embedded classifier and 28 x 28 images.
    Results are named after it, never FID: they compare models of its own data set with each other, nothing else.

    Args:
        model: moved to the device and put into evaluation mode.
        name: of these weights, for the names of results.
        device: where it runs; features come back to the CPU.
    """

    def __init__(self, model: Classifier, name: str, *, device: str | torch.device = "cpu") -> None:
        if not name:
            raise ConfigError(
                "ClassifierFeatures: expected a name, got an empty one. Results carry it. Name the data set it knows."
            )
        self.name = name
        self._device = torch.device(device)
        self._model = model.to(self._device).eval()
        ends = [module for module in model.blocks if isinstance(module, nn.ReLU)]
        self._middle = ends[max(len(ends) // 2, 1) - 1]

    @classmethod
    def embedded(cls, model: str = EMBEDDED, *, device: str | torch.device = "cpu") -> ClassifierFeatures:
        """The classifier of the package for the data of a model of the package, Fashion-MNIST without another name.

        Raises: FormatError if it is missing.
        """
        folder = classifier_folder(model)
        return cls(load_classifier(folder), folder.name.replace("_", "-"), device=device)

    @classmethod
    def load(cls, folder: str | Path, *, device: str | torch.device = "cpu") -> ClassifierFeatures:
        """A classifier saved by `save_classifier`, named after its folder and the first digits of its weights' sha256.

        Raises: FormatError if it is none.
        """
        model = load_classifier(folder)
        return cls(model, f"{Path(folder).resolve().name}-{fingerprint(Path(folder) / WEIGHTS)}", device=device)

    @property
    def dimension(self) -> int:
        """Channels of the last block."""
        return self._model.channels[-1]

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Features:
        """Features of uint8 images (N, H, W, C), scaled to [-1, 1] as in training.

        Raises: ConfigError for other images, another number of channels, or images too small for the blocks.
        """
        check_images(images, self.name)
        kept: list[Tensor] = []

        def keep(_module: nn.Module, _inputs: object, output: Tensor) -> None:
            kept.append(output)

        pixels = images.to(self._device).permute(0, 3, 1, 2).float() / 127.5 - 1
        with self._middle.register_forward_hook(keep):
            pooled = self._model.features(pixels)
        probabilities = self._model.head(pooled).softmax(1)
        return Features(*(part.float().cpu() for part in (pooled, spatial_rows(kept[0]), probabilities)))
