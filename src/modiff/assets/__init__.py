"""What comes with the package: trained diffusion models by name, and classifiers of the same data that judge them."""

import re
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

from modiff.errors import FormatError

EMBEDDED = "embedded"
INDEX = "model_index.json"
"""Of a pipeline of diffusers, in its folder."""
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


class Shipped(NamedTuple):
    """The folders of a model and of its classifier next to this file, and what to type where they are missing."""

    model: str
    classifier: str
    remedy: str


MODELS = {
    EMBEDDED: Shipped(
        "fashion_mnist",
        "fashion_mnist_classifier",
        "The package was installed without its data. Install modiff again, or build the data with "
        "training/make_assets.py.",
    ),
    "cifar10": Shipped(
        "cifar10",
        "cifar10_classifier",
        "It is trained on a GPU, and this copy of the package was made without it. Use 'embedded', or make it in a "
        "clone of the repository: python training/make_assets.py --data cifar10, after the steps in docs/gpu.md.",
    ),
}
"""By the name that commands take."""


def packaged() -> list[str]:
    """Names of the models that this copy of the package has."""
    return [name for name, shipped in MODELS.items() if files(__name__).joinpath(shipped.model).is_dir()]


def model_folder(name: str) -> Path:
    """The diffusers folder of a model of the package, by its name in `MODELS`; its README.md is the model card.

    Raises: FormatError for another name, or if the package has no such folder.
    """
    return _folder(name, "model", INDEX)


def local_folder(model: str | Path) -> Path | None:
    """The folder of a name in `MODELS` or of a path; None for a hub id. Raises: FormatError for anything else."""
    if str(model) in MODELS:
        return model_folder(str(model))
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if isinstance(model, str) and _HUB_ID.fullmatch(model) and not path.exists() and not path.parent.is_dir():
        return None
    raise FormatError(
        f"{model}: expected {', '.join(map(repr, packaged()))}, a diffusers folder or a hub id, got "
        f"{'a file' if path.exists() else 'no such folder'}. A pipeline is a folder with {INDEX}. Write one with "
        "pipe.save_pretrained(folder)."
    )


def embedded_folder() -> Path:
    """The diffusers folder of the embedded Fashion-MNIST model; its README.md is the model card."""
    return model_folder(EMBEDDED)


def text_folder() -> Path:
    """The folder of the small text model, for `modiff.sampling.masked.MaskedTextPipeline.from_pretrained`.

    Raises: FormatError if the package has no such folder.
    """
    return _existing("king_james", "model_index.json", "Install modiff again, or train it with training/train_text.py.")


def classifier_folder(name: str = EMBEDDED) -> Path:
    """The folder of the classifier of a model's data, for `modiff.evaluate.features.classifier.load_classifier`.

    Raises: FormatError for another name, or if the package has no such folder.
    """
    return _folder(name, "classifier", "config.json")


def ddm_folder() -> Path:
    """The decoupled diffusion model of the embedded model's data, for `UnconditionalPipeline.from_pretrained`."""
    return _existing("fashion_mnist_ddm", "model_index.json", MODELS[EMBEDDED].remedy)


def noise_level_folder() -> Path:
    """The noise level estimator of the embedded model's data, for `NoiseLevelEstimator.from_pretrained`."""
    return _existing("fashion_mnist_noise_level", "config.json", MODELS[EMBEDDED].remedy)


def _folder(name: str, kind: str, landmark: str) -> Path:
    if name not in MODELS:
        raise FormatError(f"modiff.assets: expected one of {', '.join(MODELS)}, got {name!r}. Nothing else has a name "
                          "here. Use one of them.")  # fmt: skip
    return _existing(getattr(MODELS[name], kind), landmark, MODELS[name].remedy)


def _existing(name: str, landmark: str, remedy: str) -> Path:
    folder = Path(str(files(__name__).joinpath(name)))
    if not (folder / landmark).is_file():
        raise FormatError(f"modiff.assets: expected {name}/{landmark} in the package, got no such file. {remedy}")
    return folder
