"""What modulated quantization does to a model: per layer and step, over the steps, and over the bit widths."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypedDict

import numpy as np
from torch import nn

from modiff import presets
from modiff.config import ModiffConfig
from modiff.errors import ConfigError
from modiff.evaluate.bit_sweep import MODES, ReuseRow, SweepRow, bit_sweep, images, reuse_sweep
from modiff.evaluate.distribution import Distribution, DistributionResult
from modiff.evaluate.environment import Environment, environment
from modiff.evaluate.error_growth import ErrorGrowth, Growth
from modiff.evaluate.layer_errors import LayerErrors, LayerTrace
from modiff.evaluate.watch import watch
from modiff.hosts.verbs import modules_of

BITS = (8, 7, 6, 5, 4, 3, 2)
INTERVALS = (2, 3, 5, 10)

Progress = Callable[[int, int], None]
"""Called after every evaluation of the network with (evaluations done, evaluations in all)."""


class Settings(TypedDict):
    """What was asked for."""

    steps: int
    num_images: int
    seed: int
    bits: list[int]
    config: dict[str, Any]


class Analysis(TypedDict):
    """Everything `analyze` finds, as plain numbers for JSON."""

    environment: Environment
    settings: Settings
    layers: list[LayerTrace]
    growth: Growth
    distribution: DistributionResult
    sweep: list[SweepRow]
    reuse: list[ReuseRow]


def analyze(
    pipe: Any,
    config: ModiffConfig | None = None,
    *,
    steps: int = 50,
    num_images: int = 4,
    seed: int = 0,
    bits: Sequence[int] = BITS,
    progress: Progress | None = None,
) -> Analysis:
    """Layer errors, error growth, distributions, bit-width sweep and reuse of an unconditional pipeline.

    One full-precision trajectory serves the first three: the layers' recursions run beside it on its inputs, with the
    states of one step in memory. The sweeps sample anew with the modulated network and judge the images alone.

    Args:
        pipe: a diffusers pipeline without a prompt and without modiff; it is unchanged afterwards.
        config: of the layers' recursion, with dynamic scales; modulated 4 bits and full-precision weights when None,
            so that all errors are those of the activations.
        bits: widths of the sweep, in any order.
    Raises: ConfigError if the pipeline needs a prompt, the config has static scales or codes nothing.
    Cost: len(bits) * 4 + 5 trajectories, most of them modulated.
    """
    config = config or presets.modulated(None, 4)
    _check(config, steps, num_images)
    from modiff.hosts.diffusers import unconditional_run  # imported late: importing modiff must not load diffusers

    run = unconditional_run(pipe, steps, num_images, seed)
    used = [n for n in INTERVALS if n <= steps]
    errors, growth, distribution = LayerErrors(), ErrorGrowth(), Distribution()
    found: list[np.ndarray] = []
    with _counted(pipe, steps, 1 + len(bits) * len(MODES) + len(used), progress) as trajectory:
        watch(pipe, lambda: found.append(images(trajectory(run))), config, [errors, growth, distribution])
        grown = growth.growth()  # before the long part: it may have nothing to show
        sweep = bit_sweep(pipe, lambda: trajectory(run), found[0], config, bits)
        reuse = reuse_sweep(pipe, lambda: trajectory(run), found[0], config, used)
    return {
        "environment": environment(),
        "settings": {
            "steps": steps, "num_images": num_images, "seed": seed, "bits": list(bits), "config": config.to_dict()
        },
        "layers": errors.layers(), "growth": grown, "distribution": distribution.result(), "sweep": sweep,
        "reuse": reuse,
    }  # fmt: skip


def _check(config: ModiffConfig, steps: int, num_images: int) -> None:
    if steps < 2:
        raise ConfigError(f"analyze: expected 2 or more steps, got {steps}. The method codes what changes between steps. "
                          "Give steps=50.")  # fmt: skip
    if num_images < 1:
        raise ConfigError(f"analyze: expected 1 or more images, got {num_images}. Give num_images=4.")
    for layer in (config.layer, *(override for _, override in config.overrides)):
        if not layer.activation.dynamic:
            raise ConfigError("analyze: expected dynamic scales, got dynamic=False. Static ones are measured on a modulated model, "
                              "and this watches the plain one. Use dynamic=True.")  # fmt: skip


@contextmanager
def _counted(
    pipe: Any, steps: int, trajectories: int, progress: Progress | None
) -> Iterator[Callable[[Callable[[], object]], object]]:
    """Gives a wrapper for each trajectory; reports each evaluation. The first trajectory tells how many there are in one."""
    done, finished, each = 0, 0, steps

    def evaluated(*_: object) -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, max(done, each * trajectories))

    def trajectory(run: Callable[[], object]) -> object:
        nonlocal finished, each
        result = run()
        finished += 1
        each = done // finished
        return result

    modules: dict[str, nn.Module] = modules_of(pipe)
    handles = [module.register_forward_hook(evaluated) for module in modules.values()]
    try:
        yield trajectory
    finally:
        for handle in handles:
            handle.remove()
