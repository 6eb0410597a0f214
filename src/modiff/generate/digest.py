"""Is it the same model? One number for weights and settings, wherever the files lie."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

_OF_THE_LIBRARY = ("transformers_version", "torch_dtype", "dtype")


def digest(pipe: DiffusionPipeline) -> str:
    """sha256 over kind, settings and weights of every component but the scheduler; paths and versions do not count.

    Cost: reads all weights once.
    """
    total = hashlib.sha256()
    for name, component in sorted(pipe.components.items()):
        if name == "scheduler":
            continue
        total.update(json.dumps([name, type(component).__name__, settings(component)], sort_keys=True).encode())
        if isinstance(component, nn.Module):
            for key, tensor in sorted(component.state_dict().items()):
                total.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
                total.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return total.hexdigest()


def settings(component: object) -> dict[str, Any]:
    """A component's config as plain JSON values, without what the library keeps for itself."""
    values = _plain(getattr(component, "config", {}))
    kept = {key: value for key, value in values.items() if not key.startswith("_") and key not in _OF_THE_LIBRARY}
    return json.loads(json.dumps(kept, default=_plain))


def _plain(value: Any) -> Any:
    """A config as a dictionary, also one within another; other objects by their kind, as their text may hold ids."""
    if hasattr(value, "to_dict"):
        return value.to_dict()
    return dict(value) if isinstance(value, Mapping) else f"{type(value).__module__}.{type(value).__qualname__}"
