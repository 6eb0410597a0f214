"""Write a quantized pipeline or model to a folder, and read it back."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from modiff.checkpoint.module_folder import CLASS, CONFIG, bytes_of, load_module, read_config, save_module
from modiff.errors import ConfigError, FormatError
from modiff.files import new_folder
from modiff.model.attach import attachment_of

INDEX = "model_index.json"


def is_diffusers_model(target: object) -> bool:
    """Whether a module is one of diffusers; never loads diffusers."""
    modeling = sys.modules.get("diffusers.models.modeling_utils")
    return modeling is not None and isinstance(target, modeling.ModelMixin)


def save_target(target: Any, models: list[nn.Module], folder: str | Path, max_shard_size: int | str) -> None:
    """The verb `modiff.save`; `models` are the networks of `target` that carry modiff."""
    size = bytes_of(max_shard_size)
    if isinstance(target, nn.Module) and not is_diffusers_model(target):
        save_module(target, folder, max_shard_size=size)
        return
    from modiff.hosts.quantizer import saving_quantized

    with new_folder(folder) as partial, saving_quantized(models):
        target.save_pretrained(partial, max_shard_size=size)


def load_target(folder: str | Path, into: nn.Module | None, device: str, dtype: torch.dtype) -> Any:
    """The verb `modiff.load`."""
    path = Path(folder).expanduser()
    if (path / INDEX).is_file():
        if into is not None:
            raise _no_place(path, into)
        from modiff.hosts import diffusers
        from modiff.hosts.load import load_pipeline

        pipe = load_pipeline(path, device=device, dtype=dtype)
        if all(attachment_of(model) is None for model in diffusers.denoisers(pipe).values()):
            raise FormatError(f"{path}: expected a quantized pipeline, got a plain {type(pipe).__name__}. It was saved "
                              "without modiff. Load it with diffusers, then use modiff.apply.")  # fmt: skip
        diffusers.attach(pipe)
        return pipe
    config = read_config(path)
    if CLASS in config:
        if into is None:
            raise ConfigError(
                f"load: expected into=, a {config[CLASS]} in full precision, got none. A folder holds the weights of a "
                "torch module, not its code. Use modiff.load(folder, into=module)."
            )
        return load_module(path, into).to(device)
    if into is not None:
        raise _no_place(path, into)
    if "quantization_config" not in config:
        raise FormatError(f"{path / CONFIG}: expected a quantization_config, got none. The model is not quantized. "
                          "Load it with diffusers, then use modiff.apply.")  # fmt: skip
    from modiff.hosts.load import load_model

    return load_model(path, device=device, dtype=dtype)


def _no_place(path: Path, into: nn.Module) -> ConfigError:
    return ConfigError(
        f"load: expected no into= for {path}, got a {type(into).__name__}. The folder says which class of diffusers it "
        "holds. Use modiff.load(folder)."
    )
