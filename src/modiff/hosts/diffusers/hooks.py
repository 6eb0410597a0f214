"""What diffusers calls on its models: cache contexts around branches of guidance, resets, fusing of LoRAs."""

from __future__ import annotations

import functools
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Never

from torch import nn

from modiff.errors import StateError
from modiff.model.attach import Automatic, attachment_of, required_attachment
from modiff.model.trajectory import model_context

_RESET = "_reset_stateful_cache"
_FUSE = "fuse_lora"


def follow_cache_context(model: nn.Module) -> None:
    """Let `model.cache_context("cond")`, which pipelines enter around each branch of guidance, choose states too."""
    own = getattr(type(model), "cache_context", None)
    if own is None:
        return

    @contextmanager
    @functools.wraps(own)
    def cache_context(self: nn.Module, name: str, *args: Any, **kwargs: Any) -> Iterator[None]:
        with model_context(self, name), own(self, name, *args, **kwargs):
            yield

    model.__dict__["cache_context"] = types.MethodType(cache_context, model)  # copy.deepcopy binds it to the copy


@contextmanager
def cache_contexts(model: nn.Module) -> Iterator[None]:
    """Follow the model's cache contexts while the body runs; nothing changes where they are followed already."""
    if "cache_context" in model.__dict__:
        yield
        return
    follow_cache_context(model)
    try:
        yield
    finally:
        model.__dict__.pop("cache_context", None)


def follow(model: nn.Module) -> None:
    """Let a model with modulated layers begin trajectories by itself, whichever pipeline runs it.

    Its cache contexts choose states, and the reset at the end of a pipeline's call ends the trajectory.
    """
    attachment = required_attachment(model, "follow")
    attachment.automatic = Automatic(attachment.clock)
    follow_cache_context(model)
    own = getattr(type(model), _RESET, None)

    def reset(self: nn.Module, recurse: bool = True) -> None:
        attachment = attachment_of(self)
        if attachment is not None and attachment.automatic is not None:
            attachment.automatic.end()
        if own is not None:
            own(self, recurse)

    model.__dict__[_RESET] = types.MethodType(reset, model)  # copy.deepcopy binds it to the copy


def unfollow(model: nn.Module) -> None:
    """Undo `follow`; nothing happens where it was not called."""
    for name in ("cache_context", _RESET, _FUSE):
        model.__dict__.pop(name, None)


def refuse_fusing(model: nn.Module) -> None:
    """Let `model.fuse_lora` say what is wrong, instead of adding floats to integer codes."""
    if not hasattr(type(model), _FUSE):
        return

    def fuse_lora(self: nn.Module, *_: Any, **__: Any) -> Never:
        raise StateError(
            f"fuse_lora: expected float weights to add the LoRA to, got {type(self).__name__} with packed ones. An "
            "adapter next to a packed layer works as it is. Leave it unfused, or fuse it before modiff.apply."
        )

    model.__dict__[_FUSE] = types.MethodType(fuse_lora, model)  # copy.deepcopy binds it to the copy
