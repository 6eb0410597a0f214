"""What diffusers calls on its models: cache contexts around branches of guidance, resets, fusing of LoRAs."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Never

import torch
from diffusers.models.cache_utils import CacheMixin
from torch import nn

from modiff.errors import StateError
from modiff.model.attach import Automatic, attachment_of, required_attachment
from modiff.model.trajectory import model_context

_RESET = "_reset_stateful_cache"


def follow_cache_context(model: nn.Module) -> None:
    """Let `model.cache_context("cond")`, which pipelines enter around each branch of guidance, choose states too."""
    if hasattr(type(model), "cache_context"):
        # a partial of a function of this module: a copy and a pickle of the model bind it to the copy
        model.__dict__["cache_context"] = functools.partial(_cache_context, model)


@contextmanager
@functools.wraps(CacheMixin.cache_context, assigned=())  # under its own name, by which a pickle finds it
def _cache_context(model: Any, name: str, *args: Any, **kwargs: Any) -> Iterator[None]:
    with model_context(model, name), type(model).cache_context(model, name, *args, **kwargs):
        yield


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
    model.__dict__[_RESET] = functools.partial(_reset, model)


def _reset(model: nn.Module, recurse: bool = True) -> None:
    attachment, own = attachment_of(model), getattr(type(model), _RESET, None)
    if attachment is not None and attachment.automatic is not None:
        attachment.automatic.end()
    if own is not None:
        own(model, recurse)


def unfollow(model: nn.Module) -> None:
    """Undo `follow`; nothing happens where it was not called."""
    for name in ("cache_context", _RESET):
        model.__dict__.pop(name, None)


def guard_packed(model: nn.Module) -> None:
    """Let `fuse_lora` refuse to add floats to codes, and `to` take the dtype that the model has."""
    for name, method in (("fuse_lora", _fuse_lora), ("to", _to)):
        if hasattr(type(model), name):
            model.__dict__[name] = functools.partial(method, model)


def _fuse_lora(model: nn.Module, *_: Any, **__: Any) -> Never:
    raise StateError(
        f"fuse_lora: expected float weights to add the LoRA to, got {type(model).__name__} with packed ones. An "
        "adapter next to a packed layer works as it is. Leave it unfused, or fuse it before modiff.apply."
    )


def _to(
    model: Any, *targets: Any, device: Any = None, dtype: Any = None, non_blocking: bool = False,
    memory_format: torch.memory_format | None = None,
) -> nn.Module:  # fmt: skip
    """As diffusers, which refuses every cast of a quantized model; `from_pipe` and IP-Adapters name its own dtype."""
    for target in (*targets, device, dtype):
        if target not in (None, model.dtype):
            type(model).to(model, target, non_blocking=non_blocking)
    return model if memory_format is None else type(model).to(model, memory_format=memory_format)
