"""Follow diffusers' cache contexts: pipelines that guide in two calls enter one around each branch."""

from __future__ import annotations

import functools
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from modiff.model.trajectory import model_context


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


def unfollow_cache_context(model: nn.Module) -> None:
    """Undo `follow_cache_context`; nothing happens where it was not called."""
    model.__dict__.pop("cache_context", None)


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
        unfollow_cache_context(model)
