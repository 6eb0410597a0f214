"""Trajectories of a pipeline: what it must be told, the noise of each sample, and how often it evaluates."""

import functools
import inspect
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import product
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from PIL import Image
from torch import Tensor, nn

from modiff.config import check
from modiff.errors import ConfigError, ModiffError
from modiff.hosts.names import example_inputs
from modiff.model.trajectory import without_values

_VIDEO = ("num_frames", "frames")
_OURS = ("modiff.core.", "modiff.kernels.", "modiff.model.", "modiff.nn.")
_KNOWN = ("prompt", "class_labels", "self")


def calibration_run(pipe: DiffusionPipeline, *, steps: int, batch: int, seed: int = 0) -> Callable[[int], object]:
    """`run(i)`, which generates `batch` images from the noise of seed + i * batch, ... .

    Pipelines that draw classes get other ones in each run, drawn evenly from all: their activation ranges differ.
    Raises: ConfigError if the pipeline needs a prompt, or other inputs.
    """
    for name, number in (("steps", steps), ("num_images", batch)):
        check(name, number, type(number) is int and number >= 1, "1 or more", "A trajectory has as many.")
    parameters = inspect.signature(pipe.__call__).parameters
    if "prompt" in parameters:
        raise ConfigError(
            f"{type(pipe).__name__}: expected run=, a function that generates from prompts, got none. Calibration "
            "prompts should be like those that follow. Give run=lambda *index: pipe(prompt, ...)."
        )
    labelled = "class_labels" in parameters
    call_inputs(pipe, 1, prompt=None, label=0 if labelled else None)  # raises where more is needed

    def run(index: int) -> object:
        inputs: dict[str, Any] = {"batch_size": batch}
        if labelled:
            generator = torch.Generator().manual_seed(seed + index)
            classes = pipe.transformer.config.num_embeds_ada_norm
            inputs = {"class_labels": torch.randint(classes, (batch,), generator=generator).tolist()}
        noise = noise_generators(seed, range(index * batch, (index + 1) * batch))
        return pixels_of(pipe, inputs, steps, noise)

    return run


def pixels_of(pipe: DiffusionPipeline, inputs: dict[str, Any], steps: int, noise: list[torch.Generator]) -> np.ndarray:
    """The images that a pipeline generates of `call_inputs`, (N, H, W, C).

    Raises: ConfigError where the pipeline fails by itself, before any of modiff's layers.
    """
    try:
        return np.asarray(pipe(**inputs, num_inference_steps=steps, generator=noise, output_type="np").images)
    except ModiffError:
        raise
    except Exception as error:
        frames = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
        if any(name.startswith(_OURS) for name in frames):
            raise
        first = (str(error) or "no message").partition("\n")[0]
        raise ConfigError(
            f"{type(pipe).__name__}: expected a pipeline that generates, got {type(error).__name__} ({first}). It is "
            "raised by the pipeline's own call, without modiff. Call it from Python with the same inputs first."
        ) from error


def evaluations(pipe: DiffusionPipeline, steps: int) -> int:
    """As `Host.evaluations`: two a step for Heun, one for the last. Raises: ConfigError if the steps do not tell."""
    scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    try:
        scheduler.set_timesteps(steps)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"{type(scheduler).__name__}: expected a scheduler that needs the number of steps alone, got one that asks "
            f"for more ({error}). Its time steps depend on the image size. Give evaluations_per_run={steps}."
        ) from error
    return len(scheduler.timesteps)


def classes_in_turn(pipe: Any, count: int) -> tuple[int, ...]:
    """The first `count` classes of a pipeline that takes them, fewer where it knows fewer; () for others."""
    known = "class_labels" in inspect.signature(pipe.__call__).parameters
    return tuple(range(min(count, pipe.transformer.config.num_embeds_ada_norm))) if known else ()


def noise_generators(seed: int, indices: Iterable[int]) -> list[torch.Generator]:
    """One generator for each sample, seeded with seed + index; pass them to a pipeline as `generator=`."""
    return [torch.Generator("cpu").manual_seed(seed + index) for index in indices]


@contextmanager
def followed(pipe: DiffusionPipeline, after: Callable[[Tensor], object]) -> Iterator[None]:
    """In the body, call `after(x_s)` behind every step of the pipeline's sampler; what it raises ends the generation.

    All pipelines call `scheduler.step`; `callback_on_step_end` is missing in those of DDPM, DDIM and DiT.
    """
    scheduler: Any = pipe.scheduler
    step = scheduler.step

    @functools.wraps(step)
    def call(*args: Any, **kwargs: Any) -> Any:
        output = step(*args, **kwargs)
        after(output[0])
        return output

    scheduler.step = call
    try:
        yield
    finally:
        del scheduler.step  # an attribute of this object; the class has its own


def call_inputs(
    pipe: DiffusionPipeline, count: int, *, prompt: str | Sequence[str] | None, label: int | Sequence[int] | None
) -> dict[str, Any]:
    """The arguments that make `pipe` generate `count` images of a prompt, of a class, or of what it was trained on.

    Args:
        prompt, label: one for all images, or `count` of them.
    A sampler whose correction was made for an eta samples with that one.
    Raises: ConfigError if the pipeline needs a prompt, class or other input that is missing, has no use for one,
        or makes videos.
    """
    name = type(pipe).__name__
    parameters = inspect.signature(pipe.__call__).parameters
    if any(video in parameters for video in _VIDEO):
        raise ConfigError(
            f"{name}: expected a pipeline that makes images, got one that makes videos. Frames have no place in a "
            "folder of images. Call the pipeline from Python after modiff.apply(pipe, config)."
        )
    for value, parameter, option, example in (
        (prompt, "prompt", "prompt", "'a red fox'"), (label, "class_labels", "label", "0")
    ):  # fmt: skip
        if value is None and parameter in parameters:
            raise ConfigError(
                f"{name}: expected `{option}`, got none. It draws what it is told to. Add {option}={example}."
            )
        if value is not None and parameter not in parameters:
            raise ConfigError(
                f"{name}: expected no `{option}`, got {_short(value)}. This pipeline takes none. Leave it out."
            )
    needed = [n for n, p in parameters.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    needed = [n for n in needed if n not in _KNOWN]
    if needed:
        raise ConfigError(
            f"{name}: expected a pipeline that needs a prompt or a class at most, got one that needs "
            f"{', '.join(needed)}. modiff does not invent inputs. Call the pipeline from Python."
        )
    eta = getattr(getattr(pipe.scheduler, "correction", None), "eta", None)
    own = {"eta": eta} if eta and "eta" in parameters else {}
    if prompt is not None:
        return own | {"prompt": [prompt] * count if isinstance(prompt, str) else list(prompt)}
    if label is not None:
        labels = [label] * count if isinstance(label, int) else label
        return own | {"class_labels": [_checked_label(pipe, one) for one in labels]}
    return own | {"batch_size": count}


class _StepEnded(Exception):
    """The first step that evaluated the network."""


def rehearsals(pipe: DiffusionPipeline, network: nn.Module) -> Iterator[tuple[nn.Module, Callable[[], object]]]:
    """As `Host.rehearsals`: calls of a copy of the pipeline with a prompt, or what stands for one, and with pictures.

    They end with the first step that evaluated the network. Sizes are those that the pipeline has by default.
    """
    values = [value for part in _pipelines(pipe) for value in vars(part).values()]
    modules = [value for value in values if isinstance(value, nn.Module)]
    shared = [v for v in values if not isinstance(v, (nn.Module, SchedulerMixin, DiffusionPipeline))]
    copied, _, copies = without_values(pipe, modules, shared)
    blank, evaluated = copies[id(network)], list[nn.Module]()
    blank.register_forward_hook(lambda module, *_: evaluated.append(module))

    def ending(step: Callable[..., object]) -> Callable[..., object]:
        @functools.wraps(step)
        def ended(*args: Any, **kwargs: Any) -> object:
            if evaluated:
                raise _StepEnded
            return step(*args, **kwargs)

        return ended

    def call(words: dict[str, Any]) -> None:
        evaluated.clear()
        with suppress(_StepEnded):
            copied(**words)

    for part in _pipelines(copied):
        part.set_progress_bar_config(disable=True)
        for value in vars(part).values():
            if isinstance(value, SchedulerMixin):
                vars(value)["step"] = ending(value.step)  # type: ignore[attr-defined]
    for words in _words(pipe, network):
        yield blank, functools.partial(call, words)


def _pipelines(pipe: DiffusionPipeline) -> Iterator[DiffusionPipeline]:
    yield pipe
    for value in vars(pipe).values():
        if isinstance(value, DiffusionPipeline):
            yield from _pipelines(value)


def _words(pipe: DiffusionPipeline, network: Any) -> Iterator[dict[str, Any]]:
    """Arguments of the pipeline's call: those without a default, a prompt or what is encoded of one, then pictures."""
    call = {name: p.default for name, p in inspect.signature(pipe.__call__).parameters.items()}
    scale, length = _first(pipe, "vae_scale_factor", "vae_scale_factor_spatial") or 8, call.get("max_sequence_length")
    side = _first(pipe, "default_sample_size") or _first(network.config, "sample_size") or 0
    square = scale * (side if isinstance(side, int) else max(side)) or 1024
    image = Image.new("RGB", tuple(call.get(name) or square for name in ("width", "height")))
    pictures = {name: image for name in call if name.endswith("image") and "ip_adapter" not in name}
    pictures |= {name: [image] * (call.get("num_frames") or 16) for name in call if name.endswith("video")}
    texts = {name: "a red fox in the snow" for name in call if name in ("prompt", "source_prompt")}
    needed = {name: value for name, value in ({"class_labels": [0]} | pictures | texts).items()
              if call.get(name) is inspect.Parameter.empty}  # fmt: skip
    more = (pictures, {}) if next(iter(call), "") in pictures else ({}, pictures)  # edits have an image first
    for text, shown in product((texts, _encoded(network, length or 77, call)), more):
        yield needed | text | shown


def _encoded(network: Any, length: int, names: Iterable[str]) -> dict[str, Tensor]:
    """A prompt as the network reads it, where the pipeline has no encoders."""
    example = example_inputs(network, torch.empty(1, 1, 1, 1), rows=1, length=length) or {}
    example |= example.get("added_cond_kwargs", {})
    like = {"prompt_embeds": "encoder_hidden_states", "prompt_attention_mask": "encoder_attention_mask",
            "prompt_embeds_mask": "encoder_attention_mask",
            "pooled_prompt_embeds": "text_embeds" if "text_embeds" in example else "pooled_projections"}  # fmt: skip
    words = {name: example.get(like.get(name.removeprefix("negative_"), "")) for name in names}
    return {name: torch.zeros_like(x, device="cpu") for name, x in words.items() if x is not None}


def _first(owner: Any, *names: str) -> Any:
    return next((value for name in names if (value := getattr(owner, name, None))), None)


def _short(value: object) -> str:
    text = repr(value if isinstance(value, str | int) or not isinstance(value, Sequence) else value[0])
    return text if len(text) <= 80 else f"{text[:77]}..."


def _checked_label(pipe: DiffusionPipeline, label: int) -> int:
    classes = pipe.transformer.config.num_embeds_ada_norm
    if not 0 <= label < classes:
        raise ConfigError(
            f"label: expected 0 to {classes - 1}, got {label}. The model knows {classes} classes. Pick one."
        )
    return label
