"""Follow diffusers' cache contexts: pipelines that guide in two calls enter one around each branch."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from modiff.model.trajectory import context


def follow_cache_context(model: nn.Module) -> None:
    """Let `model.cache_context("cond")`, which pipelines enter around each branch of guidance, choose states too."""
    original = getattr(model, "cache_context", None)
    if original is None:
        return

    @contextmanager
    @functools.wraps(original)
    def cache_context(name: str, *args: Any, **kwargs: Any) -> Iterator[None]:
        with context(model, name), original(name, *args, **kwargs):
            yield

    model.__dict__["cache_context"] = cache_context


def unfollow_cache_context(model: nn.Module) -> None:
    """Undo `follow_cache_context`; nothing happens where it was not called."""
    model.__dict__.pop("cache_context", None)


@contextmanager
def cache_contexts(model: nn.Module) -> Iterator[None]:
    """Follow the model's cache contexts while the body runs."""
    follow_cache_context(model)
    try:
        yield
    finally:
        unfollow_cache_context(model)
