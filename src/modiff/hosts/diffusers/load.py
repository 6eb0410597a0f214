"""A pipeline from a folder, a hub id, or the package itself, checked before it is used."""

import importlib
import re
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline, ModelMixin
from safetensors import safe_open
from torch import nn

from modiff.assets import INDEX, local_folder
from modiff.checkpoint.module_folder import CONFIG, read_config
from modiff.errors import FormatError, ModiffError
from modiff.files import read_json, reading
from modiff.hosts import diffusers_host
from modiff.hosts.diffusers.quantizer import align

_VARIANT = re.compile(r"[^.]+(?:\.(\w+)(?:-\d+-of-\d+)?)?\.safetensors")
_PART = "part of a diffusers pipeline", "Copy the folder again, or write it again with pipe.save_pretrained(folder)."


def load_pipeline(model: str | Path, *, device: str = "cpu", dtype: torch.dtype = torch.float32) -> DiffusionPipeline:
    """A diffusers pipeline without a progress bar, its weights from safetensors; quantized networks come quantized.

    Args:
        model: a name of `modiff.assets.MODELS` ("embedded" is the Fashion-MNIST model of the package), a diffusers
            folder, or a hub id such as "google/ddpm-cifar10-32", which is downloaded once.
        device: "cpu", "cuda" or "cuda:1".
        dtype: of all weights that are not quantized.
    Raises: FormatError if the folder is none of a pipeline, weights are missing, damaged or not finite, the download
        failed, or there is no such device.
    Cost: reads all weights, and looks at each once.
    """
    diffusers_host()
    where = _device(device)
    folder = _folder(model)
    index = _index(folder)
    components = [folder / name for name in index if (folder / name).is_dir()]  # other files may lie next to them
    _check_weight_files(*components)
    parts = {name: _component(folder / name, kind, dtype) for name, kind in _models(index).items()}
    with reading(folder, *_PART):
        pipe = _pipeline_class(index).from_pretrained(
            folder, dtype=dtype, use_safetensors=True, variant=_variant(*components), local_files_only=True, **parts
        )
    for name, part in pipe.components.items():
        if isinstance(part, nn.Module):
            _check_finite(folder / name, part)
            align(part)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(where)


def load_model(folder: Path, *, device: str = "cpu", dtype: torch.dtype = torch.float32) -> nn.Module:
    """One network of diffusers from its folder, quantized or not. Raises: FormatError as `load_pipeline` does."""
    diffusers_host()
    where = _device(device)
    name = str(read_config(folder).get("_class_name"))
    kind = getattr(diffusers, name, None)
    if not (isinstance(kind, type) and issubclass(kind, ModelMixin)):
        raise FormatError(f"{folder / CONFIG}: expected a model of diffusers, got _class_name {name!r}. This "
                          "diffusers has no such model. Copy the folder again, or update diffusers.")  # fmt: skip
    _check_weight_files(folder)
    model = _component(folder, kind, dtype)
    _check_finite(folder, model)
    align(model)
    return model.to(where)


def _device(name: str) -> torch.device:
    kinds = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    if name.partition(":")[0] not in kinds:
        known = "cpu or cuda" if len(kinds) > 1 else "cpu (there is no CUDA device here)"
        raise FormatError(
            f"device: expected {known}, got {name!r}. Models run where torch finds them a place. Use cpu."
        )
    return torch.device(name)


def _folder(model: str | Path) -> Path:
    if (folder := local_folder(model)) is not None:
        return folder
    advice = "There is no folder of this name here, and the download failed: check the name and the network."
    with reading(str(model), "a diffusers folder or a pipeline on the hub", advice):
        return Path(DiffusionPipeline.download(str(model), use_safetensors=True))


def _index(folder: Path) -> dict[str, Any]:
    if not (folder / INDEX).is_file():
        raise FormatError(
            f"{folder}: expected a diffusers folder, got one without {INDEX}. It may hold a single model or another "
            "format. Write it with pipe.save_pretrained(folder)."
        )
    return read_json(folder / INDEX, *_PART)


def _pipeline_class(index: dict[str, Any]) -> type[DiffusionPipeline]:
    """One of this package or imported before, which diffusers does not know by name, or diffusers' own choice."""
    name = str(index.get("_class_name"))
    if hasattr(diffusers, name):
        return DiffusionPipeline
    for value in index.values():
        if isinstance(value, list) and value and str(value[0]).startswith("modiff."):
            importlib.import_module(value[0])
    kinds: list[type[DiffusionPipeline]] = [DiffusionPipeline]
    for kind in kinds:  # grows while it is read
        kinds += kind.__subclasses__()
    return next((kind for kind in kinds if kind.__name__ == name), DiffusionPipeline)


def _models(index: dict[str, Any]) -> dict[str, type[ModelMixin]]:
    models: dict[str, type[ModelMixin]] = {}
    for name, value in index.items():
        if isinstance(value, list) and len(value) == 2 and value[0] == "diffusers":
            kind = getattr(diffusers, str(value[1]), None)
            if isinstance(kind, type) and issubclass(kind, ModelMixin) and "from_pretrained" not in vars(kind):
                models[name] = kind  # several in one, as MultiControlNetModel, read folders of their own
    return models


def _component(path: Path, kind: type[ModelMixin], dtype: torch.dtype) -> nn.Module:
    with reading(path, *_PART):
        try:
            model, info = kind.from_pretrained(
                path, dtype=dtype, use_safetensors=True, variant=_variant(path), local_files_only=True,
                output_loading_info=True,
            )  # fmt: skip
        except ModiffError as error:
            raise FormatError(f"{path}: {error}") from error
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise FormatError(
            f"{path}: expected weights for every parameter, got none for {missing[0]} ({len(missing)} in all). The "
            "file belongs to another config or was cut. Copy the folder again."
        )
    return model


def _variant(*components: Path) -> str | None:
    """The variant, such as "fp16", of the first component whose weights all have one; diffusers finds the others."""
    for component in sorted(components):
        names = (_VARIANT.fullmatch(path.name) for path in component.glob("*.safetensors"))
        variants = {name[1] for name in names if name}
        if variants and None not in variants:
            return min(variants)
    return None


def _check_weight_files(*components: Path) -> None:
    """Open every weight file: a header that does not fit the file's length is a copy that was cut."""
    for path in sorted(path for folder in components for path in folder.glob("*pytorch_model*.bin")):
        if not any(path.parent.glob("*.safetensors")):
            raise FormatError(f"{path}: expected safetensors, got a pickle. Loading one runs what is in it. Load the "
                              "folder with diffusers and save it with safe_serialization=True.")  # fmt: skip
    for path in sorted(path for folder in components for path in folder.glob("*.safetensors")):
        with reading(path, "a safetensors file", "Copy the folder again."), safe_open(path, "pt"):
            pass


def _check_finite(where: Path, module: nn.Module) -> None:
    for name, parameter in module.named_parameters():
        if not torch.isfinite(parameter).all():
            raise FormatError(
                f"{where}: expected finite weights, got NaN or infinity in {name}. The training diverged or the file "
                "is damaged. Copy the folder again."
            )
