"""The feature extractor that a person names."""

from __future__ import annotations

import zipfile
from pathlib import Path

from modiff.errors import FormatError
from modiff.evaluate.features.classifier import ClassifierFeatures
from modiff.evaluate.features.inception import Inception
from modiff.evaluate.features.protocol import FeatureExtractor
from modiff.evaluate.features.scripted_inception import ScriptedInception

EMBEDDED = "classifier"
NAMES = {EMBEDDED: "embedded", "cifar10-classifier": "cifar10"}
"""The classifiers of the package: of which model's data each is."""


def load_extractor(text: str, *, device: str = "cpu") -> FeatureExtractor:
    """The extractor that `text` names.

    Args:
        text: "classifier" (the Fashion-MNIST one of the package), "cifar10-classifier" (where the package has it), the
            folder of another from `save_classifier`, or an Inception-v3 file: a state dict, or TorchScript.
    Raises: FormatError if it is none of these.
    """
    if text in NAMES:
        return ClassifierFeatures.embedded(NAMES[text], device=device)
    path = Path(text).expanduser()
    if path.is_dir():
        return ClassifierFeatures.load(path, device=device)
    if path.is_file():
        return ScriptedInception(path, device=device) if _is_program(path) else Inception(path, device=device)
    raise FormatError(
        f"{text}: expected '{EMBEDDED}', a classifier's folder or an Inception-v3 file, got nothing there. Distances "
        f"are taken between features. Use --extractor {EMBEDDED}."
    )


def _is_program(path: Path) -> bool:
    """TorchScript files are zip archives with code in them."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any("/code/" in name for name in archive.namelist())
