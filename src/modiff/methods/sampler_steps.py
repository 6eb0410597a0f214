"""The steps of recorded trajectories as functions: what the network says of a state, and where that leads."""

import copy
import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from modiff.api import collect
from modiff.calibration.data import Call
from modiff.errors import ConfigError
from modiff.files import read_tensors, write_tensors
from modiff.methods.recipe import MethodJob

STATE_NAMES = ("sample", "hidden_states")
TOLERANCE = 1e-3
COUNT, ORDERS = "num_inference_steps", "order_list"


def save_tables(scheduler: Any, path: Path) -> None:
    """Write what a scheduler holds of the trajectory that it runs."""
    tables = {name: getattr(scheduler, name, None) for name in ("timesteps", "sigmas", COUNT, ORDERS)}
    write_tensors(path, {n: torch.as_tensor(value).cpu() for n, value in tables.items() if value is not None}, {})


def as_recorded(scheduler: Any, path: Path | None) -> Any:
    """A copy of the scheduler as it was while the trajectories ran, by the tables in a file, or as it is now.

    Raises: FormatError for a file that is missing or damaged.
    """
    copied, advice = copy.deepcopy(scheduler), "Delete the folder: its files are made again."
    tables = {} if path is None else read_tensors(path, "the tables of a sampler", advice)[0]
    for name, value in tables.items():
        setattr(copied, name, value.tolist() if name in (COUNT, ORDERS) else value)
    return copied


def record(job: MethodJob, count: int, name: str) -> tuple[Any, list[list[Call]]]:
    """The sampler of a job's pipeline with its tables, and every call of `count` full-precision trajectories by it.

    name: of the folder of calls in the job's. Raises: ConfigError for a module alone, or guidance in two calls.
    """
    method = type(job.config).__name__
    if isinstance(job.target, nn.Module):
        raise ConfigError(f"{method}: expected a pipeline, got a module alone. Where steps arrive depends on the "
                          "sampler. Give the pipeline.")  # fmt: skip
    tables = job.path("sampler.safetensors")

    def run(index: int) -> None:
        job.run(index)
        if tables is not None and not tables.exists():  # a trajectory that is read from the folder does not set them
            save_tables(job.target.scheduler, tables)

    calls = collect(job.target, run, trajectories=count, steps=job.evaluations, seed=job.config.seed,
                    folder=job.path(name), progress=job.progress)  # fmt: skip
    trajectories: list[list[Call]] = [[] for _ in range(count)]
    for call in calls:
        if call.context != "default":
            raise ConfigError(f"{method}: expected one evaluation a step, got guidance in two calls. A step's output "
                              "comes from both. Sample without guidance, or with both in one batch.")  # fmt: skip
        trajectories[call.trajectory].append(call)
    return as_recorded(job.target.scheduler, tables), trajectories


class SamplerSteps:
    """One recorded full-precision trajectory, and the functions to run its steps from other states.

    Args:
        model: the network. scheduler: as it was while recording. calls: every evaluation of the trajectory, in order.
        guidance_scale: of classifier-free guidance with both branches in one batch; None without guidance.

    recorded: the states x_T, ..., x_0, the last one computed from the last call.
    Raises: ConfigError if the scheduler's steps are no function of the state and the output alone, or the pipeline does
        more between two evaluations than these functions know.
    """

    def __init__(self, model: nn.Module, scheduler: Any, calls: list[Call], guidance_scale: float | None) -> None:
        self.ddim = self.takes(scheduler)
        self.model, self.scheduler, self.calls = model, scheduler, calls
        self.guidance_scale = guidance_scale
        self.recorded = [self._state(call) for call in calls]
        self.recorded.append(self.recorded[-1])
        error = self.mismatch()
        if guidance_scale is not None and not error < TOLERANCE:
            self.guidance_scale = 1 - guidance_scale  # the conditional branch comes first: c + (1 - s)(u - c)
            error = self.mismatch()
        if not error < TOLERANCE:
            raise ConfigError(
                f"{type(model).__name__}: expected x <- step(network(x)), got states that differ by {error:.2g}. The "
                "pipeline does more between two evaluations: guidance, noise or rescaling. "
                "Give guidance_scale=, or use eta 0 and no rescaling."
            )
        self.recorded[-1] = self.follow(len(calls) - 1)

    def takes(self, scheduler: Any) -> bool:
        """Whether the scheduler is DDIM. Raises: ConfigError for one whose steps these functions do not know."""
        from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler  # late: other methods need no diffusers

        ddim = isinstance(scheduler, DDIMScheduler)
        if not ddim and not isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
            raise ConfigError(
                f"{type(scheduler).__name__}: expected DDIM or Euler steps of flow matching, got another sampler. Its "
                "steps depend on earlier outputs or on noise, so that a group has no error of its own. "
                "Calibrate with modiff.generate.samplers.set_scheduler(pipe, 'ddim')."
            )
        return ddim

    def follow(self, step: int) -> Tensor:
        """The state after a step from the recorded one, by the network as it computes now."""
        with torch.no_grad():
            return self.advance(step, self.recorded[step], self.evaluate(step, self.recorded[step]))

    def evaluate(self, step: int, state: Tensor) -> Tensor:
        """What the sampler is told of the network's output at `state`, guidance included."""
        output = self._with_state(self.calls[step], state).evaluate(self.model)
        tensor: Tensor = output if isinstance(output, Tensor) else output[0]
        if self.guidance_scale is not None:
            unconditional, conditional = tensor.chunk(2)
            tensor = unconditional + self.guidance_scale * (conditional - unconditional)
        return tensor[:, : state.shape[1]]  # a learned variance comes in channels behind

    def advance(self, step: int, state: Tensor, output: Tensor) -> Tensor:
        """The sampler's next state; elementwise and differentiable."""
        if self.ddim:
            timestep = int(self.scheduler.timesteps[step])
            return self.scheduler.step(output, timestep, state, eta=0.0, return_dict=False)[0]
        sigmas = self.scheduler.sigmas
        return state + (sigmas[step + 1] - sigmas[step]).to(state) * output

    def _state(self, call: Call) -> Tensor:
        state = call.args[0] if call.args else next((call.kwargs[n] for n in STATE_NAMES if n in call.kwargs), None)
        if not isinstance(state, Tensor):
            raise ConfigError(
                f"{type(self.model).__name__}: expected the state as the first argument, got {type(state).__name__}. "
                "The trajectory cannot be run from another state. Use another method."
            )
        device = next((p.device for p in self.model.parameters()), state.device)
        return (state if self.guidance_scale is None else state.chunk(2)[1]).to(device)

    def _with_state(self, call: Call, state: Tensor) -> Call:
        state = state if self.guidance_scale is None else torch.cat([state, state])
        if call.args:
            return dataclasses.replace(call, args=(state, *call.args[1:]))
        name = next(n for n in STATE_NAMES if n in call.kwargs)
        return dataclasses.replace(call, kwargs={**call.kwargs, name: state})

    def mismatch(self) -> float:
        """How far recorded states are from where these functions lead, at the first step and in the middle."""
        steps = [step for step in {0, len(self.calls) // 2} if step + 1 < len(self.calls)]
        pairs = [(self.follow(step), self.recorded[step + 1]) for step in steps]
        return max((float((state - true).norm() / true.norm()) for state, true in pairs), default=0.0)
