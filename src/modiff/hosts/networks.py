"""The networks of a target."""

from __future__ import annotations

from typing import Any

from torch import nn

from modiff.errors import ConfigError
from modiff.model.attach import eager


def modules_of(target: Any) -> dict[str, nn.Module]:
    """The networks of a target by name: a module alone, or the denoisers of a diffusers pipeline.

    Raises: ConfigError for anything else.
    """
    if isinstance(target, nn.Module):
        model = eager(target)
        return {type(model).__name__: model}
    if hasattr(target, "components"):
        from modiff.hosts import diffusers  # imported late: modules need no diffusers

        if isinstance(target, diffusers.DiffusionPipeline):
            return diffusers.denoisers(target)
    raise ConfigError(
        f"target: expected a diffusers pipeline or a torch module, got {type(target).__name__}. "
        "modiff works on objects, not on names. Load it first, e.g. DiffusionPipeline.from_pretrained(folder)."
    )
