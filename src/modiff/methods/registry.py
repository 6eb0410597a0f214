"""The methods by name: what to say to quantize, with which settings, and which combinations mean nothing."""

import dataclasses
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modiff.api import remove
from modiff.calibration.reconstruct.store import digest_of
from modiff.config import ModulationConfig
from modiff.errors import ConfigError
from modiff.files import ResumableFolder
from modiff.methods.recipe import MethodConfig, MethodJob
from modiff.model.attach import attachment_of
from modiff.model.report import Report

Recipe = Callable[[MethodJob, Any], Report]
"""(job, settings) -> report. It applies a config to the job's target; what it raises undoes that."""


@dataclass(frozen=True)
class Method:
    """A published method.

    config: its settings; without arguments, the paper's; `quick()` for the embedded model and others of its size.
    plain, modulated: why it is refused without, or with modulation; empty where it is not.
    """

    recipe: Recipe
    config: type[MethodConfig]
    plain: str = ""
    modulated: str = ""


METHODS: dict[str, Method] = {}
"""By name. `modiff.methods` fills it; so may you, with `register`."""


def register(config: type[MethodConfig], *, plain: str = "", modulated: str = "") -> Callable[[Recipe], Recipe]:
    """Make a function a method, under the function's name: a decorator with the fields of `Method`."""

    def registered(recipe: Recipe) -> Recipe:
        METHODS[recipe.__name__] = Method(recipe, config, plain, modulated)
        return recipe

    return registered


def name_of(config: MethodConfig) -> str:
    """The name of the method whose settings these are. Raises: ConfigError for others."""
    for name, method in METHODS.items():
        if type(config) is method.config:
            return name
    known = ", ".join(method.config.__name__ for method in METHODS.values())
    raise ConfigError(f"method: expected one of {known}, got a {type(config).__name__}. Its type names the method. "
                      "Give the settings of a method.")  # fmt: skip


def method_config(
    name: str,
    *,
    quick: bool = False,
    values: dict[str, Any] | None = None,
    modulated: bool | None = None,
    changes: dict[str, Any] | None = None,
) -> MethodConfig:
    """The settings of a method: the paper's or the quick ones, then `values`, as JSON has them, then `changes`.

    name: "-" is as good as "_".
    modulated: True for residuals, False for whole activations, None as the settings say.
    Raises: ConfigError for a name, field or value that does not exist, or a combination that is refused.

    >>> method_config("ptq4dm", quick=True, changes={"activation_bits": 4}).activation_bits
    4
    """
    method = METHODS.get(name.replace("-", "_"))
    if method is None:
        raise ConfigError(f"method: expected one of {', '.join(METHODS)}, got {name!r}. Pick one of them.")
    config = method.config.quick() if quick else method.config()
    if changes or values:
        config = method.config.from_dict(_merged(config.to_dict(), values or {}) | (changes or {}))
    return config if modulated is None else _modulated(name, method, config, modulated)


def _merged(present: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    merged = dict(present)
    for name, value in values.items():
        inside = merged.get(name)
        merged[name] = _merged(inside, value) if isinstance(inside, dict) and isinstance(value, dict) else value
    return merged


def _modulated(name: str, method: Method, config: MethodConfig, modulated: bool) -> MethodConfig:
    reason = method.modulated if modulated else method.plain
    if reason:
        takers = [n for n, m in METHODS.items() if not (m.modulated if modulated else m.plain)]
        raise ConfigError(
            f"{name}: expected {'no ' if modulated else ''}modulation, got {'it' if modulated else 'none'}. {reason}. "
            f"Use method={' or '.join(takers)}."
        )
    if method.plain or (getattr(config, "modulation", None) is not None) == modulated:
        return config
    return dataclasses.replace(config, modulation=ModulationConfig() if modulated else None)


def quantize(
    target: Any,
    method: str | MethodConfig | Callable[[], MethodConfig],
    *,
    quick: bool = False,
    run: Callable[[int], object] | None = None,
    evaluations_per_run: int | None = None,
    folder: str | Path | None = None,
    note: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> Report:
    """Quantize a pipeline's denoiser, or a module, by a published method, in place; `modiff.remove(target)` undoes it.

        modiff.quantize(pipe, QDiffusionConfig(weight_bits=4), run=lambda i: pipe(prompts[i]), folder="work")

    Args:
        target: a pipeline with one denoiser; or a module, with `run` and `evaluations_per_run` for calibration.
        method: its settings, their class, or its name, which stand for the paper's settings; a name also for `quick`
            ones.
        run: `run(i)` generates the `config.batch` images of trajectory i; needed where the pipeline takes a prompt.
        evaluations_per_run: of the network in a trajectory; the scheduler says it when None.
        folder: keeps the calibration data and what was learned, so that an interrupted job goes on, to the same bits.
        note: what `run` depends on (prompts, for example), as JSON values: a folder never mixes two.
    Raises: ConfigError, CalibrationError or StateError if the model cannot be quantized so, or the folder is another
        job's; FormatError for a damaged folder. The target is as before then.
    Cost: as the method's settings say; with a folder, one pass over the weights.
    """
    config = method() if callable(method) else method
    config = method_config(config, quick=quick) if isinstance(config, str) else config
    name = name_of(config)
    path = None if folder is None else Path(folder)
    job = MethodJob(target, config, run, evaluations_per_run, path, progress)
    scheduler: Any = getattr(target, "scheduler", None)
    sampler = None if scheduler is None else [type(scheduler).__name__, repr(sorted(scheduler.config.items()))]
    decides = {"format_version": 1, "method": name, "settings": config.to_dict(), "sampler": sampler, "run": note}
    digest = None if path is None else digest_of({}, job.model.parameters())
    with nullcontext() if path is None else ResumableFolder(path, decides | {"model": digest}):
        try:
            return METHODS[name].recipe(job, config)
        except BaseException:
            if attachment_of(job.model) is not None:  # half of a method is of no use to anyone
                remove(target)
            raise
