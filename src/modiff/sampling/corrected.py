"""Samplers that correct what a quantized network says, step by step: one table for PTQD, TAC and methods like them.

    e_t = g_t * output + c_t          what the scheduler is told of the network's output (noise, v or sample)
    x_s = step(x_t, e_t) - b_t        with noise sigma'_t = n_t * sigma_t

PTQD is g = 1 / (1 + k), c = -mu g and n < 1; TAC is g = K and b; D2-DPM is g = 1 - s, c = s mu_q - mu_D with s = rho
sd_D / sd_q. A table goes on any pipeline, whatever quantized its network: `pipe.scheduler = corrected(...)`.
"""

import dataclasses
import functools
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from modiff.config import JsonConfig, check
from modiff.errors import ConfigError
from modiff.hosts import diffusers_host
from modiff.sampling import ENTRY

diffusers_host()  # lets `from_pretrained` read folders of quantized networks

Rows = tuple[tuple[float, ...], ...]
TABLES = ("gain", "offset", "shift")
_PARALLEL = "It also makes many steps at once, by batch_step_no_noise, which no table is applied to."
_WHY_NOT = dict.fromkeys(("DDIMParallelScheduler", "DDPMParallelScheduler"), _PARALLEL)
_WHY_NOT["DDIMInverseScheduler"] = "It goes from images to noise, and a table is learned from noise to images."
_OTHER_STEPS = "The table is for those. Sample with as many steps, or calibrate again."


@dataclass(frozen=True, kw_only=True)
class Correction(JsonConfig):
    """What is changed at each of T steps; None changes nothing.

    timesteps: (T,), those of the steps that the table was made for, the noisiest first.
    gain, offset: g_t and c_t, (T, 1) or (T, C) for each channel of the output. shift: b_t, (T, 1) or (T, C).
    noise: n_t = sigma'_t / sigma_t, (T,), for samplers that add noise. eta: of DDIM, that `noise` was made for.
    released_direction: DDIM scales its direction by sqrt(1 - ab_s - sigma'_t²), as PTQD's released code does, and not
        by sigma_t²: the mean of the step changes. It is there to measure that fault.
    threshold: g_t is for `large` entries alone, those with |output| > threshold * mean |output| of their sample.
    channel_dim: of outputs and states: 1; -1 for packed tokens (N, tokens, C), 2 for CogVideoX's frames.
    Raises: ConfigError for tables of another length, or numbers that are not finite.
    """

    timesteps: tuple[float, ...]
    gain: Rows | None = None
    offset: Rows | None = None
    noise: tuple[float, ...] | None = None
    shift: Rows | None = None
    eta: float | None = None
    released_direction: bool = False
    threshold: float | None = None
    channel_dim: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("timesteps", len(self.timesteps) >= 1, "1 or more", "There is nothing to correct.")
        why = "There is a row of one number, or one for each channel, for each step."
        for name in (*TABLES, "noise"):
            table = getattr(self, name)
            self.check(name, table is None or len(table) == len(self.timesteps), f"{len(self.timesteps)} rows", why)
            widths = {len(row) for row in table or ()} if name != "noise" else {1}
            self.check(name, len(widths - {0}) <= 1 and 0 not in widths, "rows of one width", why)
        self.check("threshold", self.threshold is None or self.threshold >= 0, "0 or more", "It is a share of a mean.")
        self.check("eta", self.eta is None or self.eta >= 0, "0 or more", "It is DDIM's.")
        self.check("noise", self.noise is None or min(self.noise) >= 0, "0 or more", "They scale noise.")

    @classmethod
    def of(
        cls, timesteps: Sequence[float] | Tensor, *, gain: Tensor | None = None, offset: Tensor | None = None,
        noise: Tensor | None = None, shift: Tensor | None = None, eta: float | None = None,
        released_direction: bool = False, threshold: float | None = None, channel_dim: int = 1,
    ) -> Self:  # fmt: skip
        """From tensors of these shapes."""
        gain_rows, offset_rows, shift_rows = (None if t is None else _rows(t) for t in (gain, offset, shift))
        return cls(
            timesteps=tuple(float(t) for t in timesteps), gain=gain_rows, offset=offset_rows, shift=shift_rows,
            noise=None if noise is None else tuple(noise.double().tolist()), eta=eta,
            released_direction=released_direction, threshold=threshold, channel_dim=channel_dim,
        )  # fmt: skip

    def then(self, other: "Correction") -> "Correction":
        """Both: this one, and `other` on its result. Raises: ConfigError if they are for other steps or axes."""
        for name in ("timesteps", "channel_dim", "eta", "threshold"):
            first, second = getattr(self, name), getattr(other, name)
            fits = first == second if name != "threshold" else first is second is None
            fits = fits or (name == "eta" and None in (first, second))
            expected = "None in both" if name == "threshold" else f"that of the first, {first}"
            check(f"then.{name}", second, fits, expected, "One table must say what both do. Make both for the same.")
        a, b = ({n: _table(getattr(c, n)) for n in TABLES} for c in (self, other))
        gain = _combined(torch.mul, a["gain"], b["gain"])
        scaled = _combined(torch.mul, a["offset"], b["gain"]) if a["offset"] is not None else None
        noise = _combined(torch.mul, _table(self.noise), _table(other.noise))
        return Correction.of(
            self.timesteps, gain=gain, offset=_combined(torch.add, scaled, b["offset"]), noise=noise,
            shift=_combined(torch.add, a["shift"], b["shift"]), eta=self.eta if other.eta is None else other.eta,
            released_direction=self.released_direction or other.released_direction, channel_dim=self.channel_dim,
        )  # fmt: skip

    def step_of(self, timestep: Any) -> int:
        """The row of a timestep. Raises: ConfigError for a step that the table was not made for."""
        now = float(torch.as_tensor(timestep).flatten()[0])
        near = min(range(len(self.timesteps)), key=lambda i: abs(self.timesteps[i] - now))
        expected = f"one of {len(self.timesteps)} timesteps, {self.timesteps[0]:g} to {self.timesteps[-1]:g}"
        check("correction", now, _equal(now, self.timesteps[near]), expected, _OTHER_STEPS)
        return near

    def row(self, name: str, index: int, like: Tensor) -> Tensor | None:
        """A row of a table, in a shape that broadcasts to `like`; at least float32. None where nothing changes."""
        table = getattr(self, name)
        if table is None:
            return None
        channels, width = like.shape[self.channel_dim], len(table[index])
        check(f"correction.{name}", width, width in (1, channels), f"1 or {channels} numbers a step",
              "There is one for all channels, or one for each. Calibrate with this model.")  # fmt: skip
        shape = [1] * like.dim()
        shape[self.channel_dim] = -1
        dtype = torch.promote_types(like.dtype, torch.float32)
        return torch.tensor(table[index], dtype=dtype, device=like.device).reshape(shape)


def _equal(timestep: float, known: float) -> bool:
    return abs(timestep - known) <= 1e-4 * max(1.0, abs(known))


def _rows(table: Tensor) -> Rows:
    return tuple(tuple(row) for row in table.double().reshape(len(table), -1).tolist())


def _table(rows: Rows | tuple[float, ...] | None) -> Tensor | None:
    return None if rows is None else torch.tensor(rows, dtype=torch.float64)


def _combined(operation: Any, first: Tensor | None, second: Tensor | None) -> Tensor | None:
    if first is None or second is None:
        return second if first is None else first
    return operation(first.double(), second.double())


def large(output: Tensor, threshold: float) -> Tensor:
    """Where |output| > threshold * mean |output| of its sample."""
    size = output.abs()
    return size > threshold * size.flatten(1).mean(1).reshape(-1, *[1] * (output.dim() - 1))


def corrected(scheduler: Any, correction: Correction | None) -> Any:
    """The scheduler with the same settings and this correction; None takes a correction off.

        pipe.scheduler = corrected(pipe.scheduler, correction)

    It is written to scheduler_config.json, and diffusers reads it again once modiff is imported. With g = 1, c = 0 and
    n = 1 it samples the same bits as the plain one.
    Raises: ConfigError for a scheduler that is not DDIM (CogVideoX's too), DDPM, DPM-Solver++ or Euler for flow
        matching, or a table that its step cannot express.
    """
    if correction is None:
        return scheduler.without_correction() if isinstance(scheduler, Corrected) else scheduler
    return corrected_kind(type(scheduler)).from_config(scheduler.config, correction=correction.to_dict())


def with_eta_of(other: Any, scheduler: Any) -> Any:
    """The scheduler, or one that corrects nothing and has the eta of another's correction: both get the same noise."""
    table = getattr(other, "correction", None)
    if table is None or not table.eta:
        return scheduler
    return corrected(scheduler, Correction(timesteps=table.timesteps, eta=table.eta))


def corrected_kind(kind: type) -> Any:
    """The class that corrects a scheduler of this class. Raises: ConfigError if there is none."""
    for known in KINDS:
        if known.kind is kind or known is kind:
            return known
    names = ", ".join(known.kind.__name__ for known in KINDS)
    why = _WHY_NOT.get(kind.__name__, "Tables are applied to the steps of those alone.")
    raise ConfigError(
        f"correction: expected one of {names}, got {kind.__name__}. {why} Use one of them; corrected(scheduler, None) "
        "takes a correction off."
    )


class Corrected:
    """What corrected schedulers share. A subclass has the scheduler of diffusers as its second base."""

    kind: ClassVar[type]
    correction: Correction | None
    config: Any

    def __init_subclass__(cls) -> None:
        kind: Any = cls.__bases__[1]
        cls.kind = kind

        @functools.wraps(kind.__init__)
        def initialize(self: Any, *args: Any, correction: dict[str, Any] | None = None, **settings: Any) -> None:
            kind.__init__(self, *args, **settings)
            self.register_to_config(correction=correction)
            self.correction = None if correction is None else Correction.from_dict(correction)
            if self.correction is not None and self.correction.noise is not None:
                self.check_noise(self.correction)

        @functools.wraps(kind.set_timesteps)
        def set_timesteps(self: Any, *args: Any, **settings: Any) -> None:
            kind.set_timesteps(self, *args, **settings)
            self.check_timesteps()

        @functools.wraps(kind.step)
        def step(self: Any, *args: Any, **settings: Any) -> Any:
            bound = inspect.signature(kind.step).bind(self, *args, **settings)
            return self.corrected_step(bound)

        signature = inspect.signature(kind.__init__)
        own = inspect.Parameter(ENTRY, inspect.Parameter.KEYWORD_ONLY, default=None)
        initialize.__signature__ = signature.replace(parameters=[*signature.parameters.values(), own])  # pyright: ignore
        for name, function in (("__init__", initialize), ("set_timesteps", set_timesteps), ("step", step)):
            setattr(cls, name, function)
        cls.__module__ = "modiff.sampling"  # which is loaded with modiff: diffusers loads no module that a folder names

    def without_correction(self) -> Any:
        """The plain scheduler of the same settings."""
        return self.kind.from_config({name: value for name, value in self.config.items() if name != ENTRY})

    def check_noise(self, correction: Correction) -> None:
        """Raise the ConfigError of a noise table that this sampler cannot express."""
        raise ConfigError(
            f"{type(self).__name__}: expected a correction without `noise`, got one with it. This sampler adds no "
            "noise, or not in a way that can be scaled. Calibrate with DDIM (eta > 0), DDPM or SDE-DPM-Solver++."
        )

    def check_timesteps(self) -> None:
        """Raise the ConfigError of steps that the correction was not made for."""
        if self.correction is None:
            return
        now: Any = vars(self)["timesteps"]
        known = self.correction.timesteps
        fits = len(now) == len(known) and all(map(_equal, map(float, now), known))
        check("correction", len(now), fits, f"{len(known)} steps, from {known[0]:g} to {known[-1]:g}", _OTHER_STEPS)

    def corrected_step(self, bound: inspect.BoundArguments) -> Any:
        """`kind.step` on the corrected output, its result moved by the shift."""
        correction, told = self.correction, bound.arguments
        if correction is None:
            return self.kind.step(*bound.args, **bound.kwargs)
        output, sample = told["model_output"], told["sample"]
        index, own = correction.step_of(told["timestep"]), getattr(self, "step_index", None)
        if own is not None and correction.timesteps[own : own + 1] == correction.timesteps[index : index + 1]:
            index = own  # sigmas that lie close together are the same whole timestep
        channels = sample.shape[correction.channel_dim]
        value = output.narrow(correction.channel_dim, 0, channels)  # a learned variance comes in channels behind
        gain, offset = (correction.row(name, index, value) for name in ("gain", "offset"))
        changed = value if gain is None else value * gain
        if correction.threshold is not None:
            changed = torch.where(large(value, correction.threshold), changed, value)
        changed = (changed if offset is None else changed + offset).to(output.dtype)
        rest = output.narrow(correction.channel_dim, channels, output.shape[correction.channel_dim] - channels)
        told["model_output"] = torch.cat([changed, rest], correction.channel_dim) if rest.numel() else changed
        if correction.noise is not None:
            self.scale_noise(told, correction, correction.noise[index])
        result = self.kind.step(*bound.args, **bound.kwargs)
        shift = correction.row("shift", index, sample)
        if shift is None:
            return result
        following = result[0] - shift.to(result[0].dtype)
        if isinstance(result, tuple):
            return following, *result[1:]
        return dataclasses.replace(result, prev_sample=following)

    def scale_noise(self, told: dict[str, Any], correction: Correction, factor: float) -> None:
        """Let the step that is about to be made add `factor` times its noise."""
        noise = told.get("variance_noise")
        if noise is None:  # what the scheduler would draw
            output = told["model_output"]
            noise = randn_tensor(output.shape, told.get("generator"), device=output.device, dtype=output.dtype)
        told["variance_noise"], told["generator"] = noise * factor, None


class CorrectedDDIMScheduler(Corrected, DDIMScheduler):
    """DDIM with a `Correction`."""

    def check_noise(self, correction: Correction) -> None:
        """A noise table is for one eta."""
        check("correction.eta", correction.eta, correction.eta is not None and correction.eta > 0, "that of `noise`",
              "DDIM's noise is eta times that of DDPM. Give eta=1.0.")  # fmt: skip

    def scale_noise(self, told: dict[str, Any], correction: Correction, factor: float) -> None:
        """As the other samplers; the released step scales eta, and with it the direction."""
        eta = told.get("eta", 0.0)
        check("step.eta", eta, eta == correction.eta, f"{correction.eta}, which the correction was made for",
              "Its noise table is for that one. Sample with it, or calibrate again.")  # fmt: skip
        if correction.released_direction:
            told["eta"] = eta * factor
        else:
            super().scale_noise(told, correction, factor)


class CorrectedDDPMScheduler(Corrected, DDPMScheduler):
    """DDPM with a `Correction`."""

    _factor = 1.0

    def check_noise(self, correction: Correction) -> None:
        """Noise of a learned variance is given as its logarithm, which is left alone."""
        if str(self.config.variance_type).startswith("learned"):
            super().check_noise(correction)

    def scale_noise(self, told: dict[str, Any], correction: Correction, factor: float) -> None:
        """It draws its noise inside of the step, so the variance is scaled."""
        self._factor = factor

    def _get_variance(self, t: Any, predicted_variance: Any = None, variance_type: Any = None) -> Any:
        power = 1 if self.config.variance_type == "fixed_small_log" else 2  # that one returns a standard deviation
        return super()._get_variance(t, predicted_variance, variance_type) * self._factor**power


class CorrectedDPMSolverMultistepScheduler(Corrected, DPMSolverMultistepScheduler):
    """DPM-Solver++ and its SDE with a `Correction`; past outputs are remembered corrected."""

    def check_noise(self, correction: Correction) -> None:
        """Only the SDE adds noise."""
        if not str(self.config.algorithm_type).startswith("sde"):
            super().check_noise(correction)

    def scale_noise(self, told: dict[str, Any], correction: Correction, factor: float) -> None:
        """It draws float32, whatever the output is."""
        if told.get("variance_noise") is None:
            output = told["model_output"]
            told["variance_noise"] = randn_tensor(
                output.shape, told.get("generator"), device=output.device, dtype=torch.float32
            )
        super().scale_noise(told, correction, factor)


class CorrectedDPMSolverSinglestepScheduler(Corrected, DPMSolverSinglestepScheduler):
    """DPM-Solver++ that starts again after each round of orders, with a `Correction`."""


class CorrectedCogVideoXDDIMScheduler(Corrected, CogVideoXDDIMScheduler):
    """CogVideoX's DDIM, which adds no noise, with a `Correction`."""


class CorrectedFlowMatchEulerDiscreteScheduler(Corrected, FlowMatchEulerDiscreteScheduler):
    """Euler's method for flow matching with a `Correction`."""


KINDS: tuple[Any, ...] = (
    CorrectedDDIMScheduler,
    CorrectedDDPMScheduler,
    CorrectedDPMSolverMultistepScheduler,
    CorrectedDPMSolverSinglestepScheduler,
    CorrectedCogVideoXDDIMScheduler,
    CorrectedFlowMatchEulerDiscreteScheduler,
)
