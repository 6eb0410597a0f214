"""Read back what a host saved."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from modiff.assets import INDEX
from modiff.checkpoint.module_folder import CLASS, CONFIG, load_module, read_config
from modiff.errors import ConfigError, FormatError
from modiff.hosts.host import host_of
from modiff.model.attach import attachment_of
from modiff.model.trajectory import expected_states


def load_target(folder: str | Path, into: nn.Module | None, device: str, dtype: torch.dtype) -> Any:
    """A pipeline or a model of diffusers, or `into`, with the weights of a folder. Raises: as `modiff.load`."""
    path = Path(folder).expanduser()
    config = None if (path / INDEX).is_file() else read_config(path)
    if config is not None and CLASS in config:
        if into is None:
            raise ConfigError(
                f"load: expected into=, a {config[CLASS]} in full precision, got none. A folder holds the weights of a "
                "torch module, not its code. Use modiff.load(folder, into=module)."
            )
        module = load_module(path, into).to(device)
        host_of(module).attach(module)
        return module
    if into is not None:
        raise ConfigError(
            f"load: expected no into= for {path}, got a {type(into).__name__}. The folder says which class of "
            "diffusers it holds. Use modiff.load(folder)."
        )
    return _of_diffusers(path, config, device, dtype)


def _of_diffusers(path: Path, config: dict[str, Any] | None, device: str, dtype: torch.dtype) -> Any:
    from modiff.hosts.diffusers.load import load_model, load_pipeline  # loads diffusers

    if config is not None:
        if "quantization_config" not in config:
            raise FormatError(
                f"{path / CONFIG}: expected a quantization_config, got none. The model is not quantized. Load it with "
                "diffusers, then use modiff.apply."
            )
        return load_model(path, device=device, dtype=dtype)
    pipe = load_pipeline(path, device=device, dtype=dtype)
    host = host_of(pipe)
    attachments = {model: attachment_of(model) for model in host.networks(pipe).values()}
    if not any(attachments.values()):
        raise FormatError(
            f"{path}: expected a quantized pipeline, got a plain {type(pipe).__name__}. It was saved without modiff. "
            "Load it with diffusers, then use modiff.apply."
        )
    host.attach(pipe)
    for model, attachment in attachments.items():
        if attachment is not None:
            attachment.expected_states = expected_states(model, attachment.layers, pipe)
    return pipe
