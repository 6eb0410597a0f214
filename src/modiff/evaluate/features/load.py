"""The extractor that a person names, and what its results may be called: FID and its kin only with Inception."""

from pathlib import Path

import torch
from torch import Tensor

from modiff.assets import classifier_folder
from modiff.errors import FormatError
from modiff.evaluate.features.classifier import WEIGHTS, ClassifierFeatures, load_classifier
from modiff.evaluate.features.extractor import FeatureExtractor, Features, file_digest
from modiff.evaluate.features.inception import Inception

DEFAULT_EXTRACTOR, NONE = "classifier", "none"
CLASSIFIERS = {DEFAULT_EXTRACTOR: "embedded", "cifar10-classifier": "cifar10"}
"""The classifiers of the package: of which model's data each is."""

_NAMES: dict[str, tuple[str | None, str]] = {
    "fd": ("FID", "FD"),
    "fd_to_full_precision": ("FID2FP32", "FD2FP32"),
    "spatial_fd": ("sFID", "sFD"),
    "kernel_distance": ("KID", "KD"),
    "score": ("IS", "score"),
    "precision": (None, "precision"),
    "recall": (None, "recall"),
}
"""Name with Inception, and without. Precision and recall are published with several networks, so they always say it."""


class NoFeatures:
    """The extractor "none": images are compared one by one, and never as sets."""

    name, dimension = NONE, 0
    note = "No features: images are compared one by one, not as sets. For distances of sets give an extractor."

    def __call__(self, images: Tensor) -> Features:
        """(N, 0), of any images."""
        return Features(torch.zeros(len(images), 0), None, None)


def load_extractor(text: str | None, *, channels: int = 1, device: str = "cpu") -> FeatureExtractor:
    """The extractor that `text` names: "classifier" (Fashion-MNIST, of the package), "cifar10-classifier" (where the
    package has it), the folder of another from `save_classifier` (its name carries the first digits of the weights'
    sha256), a state dict of Inception-v3, or "none". None is the package's own for grey images, otherwise none.
    Raises: FormatError for anything else.
    """
    text = text or (DEFAULT_EXTRACTOR if channels == 1 else NONE)
    if text == NONE:
        return NoFeatures()
    packaged = text in CLASSIFIERS
    path = classifier_folder(CLASSIFIERS[text]) if packaged else Path(text).expanduser().resolve()
    if path.is_dir():
        model = load_classifier(path)
        name = path.name.replace("_", "-") if packaged else f"{path.name}-{file_digest(path / WEIGHTS)}"
        return ClassifierFeatures(model, name, device=device)
    if path.is_file():
        return Inception(path, device=device)
    raise FormatError(
        f"{text}: expected '{DEFAULT_EXTRACTOR}', a classifier's folder or an Inception-v3 file, got nothing there. "
        f"Distances are taken between features. Use extractor='{DEFAULT_EXTRACTOR}'."
    )


def result_name(metric: str, extractor: FeatureExtractor) -> str:
    """The name of a metric's result: "FID" with Inception, "FD(<extractor's name>)" with every other extractor."""
    published, general = _NAMES[metric]
    if published and isinstance(extractor, Inception):
        return published
    return f"{general}({extractor.name})"
