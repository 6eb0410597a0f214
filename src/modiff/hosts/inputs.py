"""What a pipeline must be told besides steps and noise: nothing, a prompt, or a class."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from diffusers import DiffusionPipeline

from modiff.errors import ConfigError

_VIDEO = ("num_frames", "frames")
_KNOWN = ("prompt", "class_labels", "self")


def call_inputs(
    pipe: DiffusionPipeline, count: int, *, prompt: str | Sequence[str] | None, label: int | Sequence[int] | None
) -> dict[str, Any]:
    """The arguments that make `pipe` generate `count` images of a prompt, of a class, or of what it was trained on.

    Args:
        prompt, label: one for all images, or `count` of them.
    Raises: ConfigError if the pipeline needs a prompt, class or other input that is not given, takes none of what is
        given, or makes videos.
    """
    name = type(pipe).__name__
    parameters = inspect.signature(pipe.__call__).parameters
    if any(video in parameters for video in _VIDEO):
        raise ConfigError(
            f"{name}: expected a pipeline that makes images, got one that makes videos. Frames have no place in a "
            "folder of images. Call the pipeline from Python after modiff.apply(pipe, config)."
        )
    for given, parameter, option in ((prompt, "prompt", "--prompt TEXT"), (label, "class_labels", "--label N")):
        if given is None and parameter in parameters:
            raise ConfigError(
                f"{name}: expected {option}, got none. This pipeline draws what it is told to. Add {option}."
            )
        if given is not None and parameter not in parameters:
            raise ConfigError(
                f"{name}: expected no {option}, got {_short(given)}. This pipeline takes none. Leave it out."
            )
    needed = [n for n, p in parameters.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    needed = [n for n in needed if n not in _KNOWN]
    if needed:
        raise ConfigError(
            f"{name}: expected a pipeline that needs a prompt or a class at most, got one that needs "
            f"{', '.join(needed)}. modiff does not invent inputs. Call the pipeline from Python."
        )
    if prompt is not None:
        return {"prompt": [prompt] * count if isinstance(prompt, str) else list(prompt)}
    if label is not None:
        labels = [label] * count if isinstance(label, int) else label
        return {"class_labels": [_checked_label(pipe, one) for one in labels]}
    return {"batch_size": count}


def _short(given: object) -> str:
    """One value, or the first of many, with no end of text."""
    text = repr(given if isinstance(given, str | int) or not isinstance(given, Sequence) else given[0])
    return text if len(text) <= 80 else f"{text[:77]}..."


def _checked_label(pipe: DiffusionPipeline, label: int) -> int:
    classes = pipe.transformer.config.num_embeds_ada_norm
    if not 0 <= label < classes:
        raise ConfigError(
            f"--label: expected 0 to {classes - 1}, got {label}. The model knows {classes} classes. Pick one."
        )
    return label
