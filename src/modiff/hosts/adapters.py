"""LoRA on packed models: adapters beside the layers work; fusing them into integers does not."""

from __future__ import annotations

import types
from typing import Any, Never

from torch import nn

from modiff.errors import StateError

_NAME = "fuse_lora"


def refuse_fusing(model: nn.Module) -> None:
    """Let `model.fuse_lora` say what is wrong, instead of adding floats to integer codes."""
    if not hasattr(type(model), _NAME):
        return

    def fuse_lora(self: nn.Module, *_: Any, **__: Any) -> Never:
        raise StateError(
            f"fuse_lora: expected float weights to add the LoRA to, got {type(self).__name__} with packed ones. An "
            "adapter beside a packed layer works as it is. Leave it unfused, or fuse it before modiff.apply."
        )

    model.__dict__[_NAME] = types.MethodType(fuse_lora, model)  # copy.deepcopy binds it to the copy
