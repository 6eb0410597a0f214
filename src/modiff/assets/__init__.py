"""What comes with the package: a trained diffusion model, and a classifier of the same data that judges it."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from modiff.errors import FormatError


def embedded_folder() -> Path:
    """The diffusers folder of the embedded Fashion-MNIST model; its README.md is the model card.

    Raises: FormatError if the package was installed without it.
    """
    return _folder("fashion_mnist", "model_index.json")


def classifier_folder() -> Path:
    """The folder of the embedded Fashion-MNIST classifier, for `modiff.evaluate.classifier.load_classifier`.

    Raises: FormatError if the package was installed without it.
    """
    return _folder("fashion_mnist_classifier", "config.json")


def _folder(name: str, landmark: str) -> Path:
    """The folder `name` beside this file, if it holds the file `landmark`."""
    folder = Path(str(files(__name__).joinpath(name)))
    if not (folder / landmark).is_file():
        raise FormatError(
            f"modiff.assets: expected {name}/{landmark} in the package, got no such file. The package was installed "
            "without its data. Install modiff again, or build the data with training/make_assets.py."
        )
    return folder
