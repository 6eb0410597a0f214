"""A full-precision and a quantized network side by side, both evaluated at each step of the same trajectories."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from modiff.calibration.reconstruct.store import digest_of
from modiff.config import check
from modiff.files import ResumableFolder, read_tensors, write_tensors
from modiff.model.attach import attachment_of
from modiff.model.trajectory import model_context, model_trajectory
from modiff.progress import Bar

Predict = Callable[[int, Tensor], Tensor]
"""(step from 0, state) -> what the sampler is told of the network's output there, guidance included."""
RESULT = "result."


@dataclass(frozen=True)
class Batch:
    """Samples that are evaluated together.

    noise: x_T, (n, C, ...). full, quantized: what the sampler is told of either network.
    """

    noise: Tensor
    full: Predict
    quantized: Predict


class Step:
    """One step of all samples, (N, C, ...): the rows of all batches in order.

    index: from 0, the noisiest. timestep: as the scheduler has it.
    full_state, full_output: x_t and eps(x_t). state, output: y_t and eps_q(y_t). full_next: x_s, where x_t leads.
    next: y_s, from which the quantized network goes on. Set it: `step.next = step.advance(output)` follows its own
        trajectory, `step.next = step.full_next` keeps it on that of full precision.
    """

    def __init__(
        self, index: int, timestep: Any, full: tuple[Tensor, Tensor, Tensor], state: Tensor, output: Tensor | None,
        move: Callable[[Tensor, Tensor], Tensor],
    ) -> None:  # fmt: skip
        self.index, self.timestep, self.state = index, timestep, state
        self.full_state, self.full_output, self.full_next = full
        self.output, self._move = output, move
        self.used: Tensor | None = None
        self.next: Tensor | None = None

    def advance(self, output: Tensor) -> Tensor:
        """Where the sampler goes from y_t with `output`, and the noise of the full-precision step. Once a step."""
        check("lockstep.advance", "a second", self.used is None, "one call a step", "Samplers remember their outputs.")
        self.used = output
        return self._move(output, self.state)


Visit = Callable[[Step], dict[str, Tensor]]
"""Looks at a step and sets `step.next`; returns what is to be kept of it."""


@torch.no_grad()
def lockstep(
    scheduler: Any,
    batches: Sequence[Batch],
    visit: Visit,
    *,
    network: nn.Module,
    eta: float = 0.0,
    seed: int = 0,
    folder: str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> list[dict[str, Tensor]]:
    """Run both networks over all steps, and call `visit` at each. All batches are at the same step.

    The states of modulated layers are open from the first step to the last, those of each batch in a context of its
    own, so that it does not matter how samples are divided into batches.

    Args:
        scheduler: with its timesteps set; both trajectories have one like it.
        network: the quantized one; modiff may be on it, or not.
        eta, seed: of samplers that add noise; both trajectories get the same.
        folder: keeps each finished step. The same call goes on after the last one there, to the same bits; modulated
            layers read the inputs of finished steps again, full precision is not evaluated again.
        settings: what the visit depends on, as JSON values; the folder belongs to them, and to what the quantized
            network says at two steps.
    Returns: what `visit` returned, by step.
    Raises: ConfigError for a folder of other samples, steps, settings or networks, or a visit that does not say where
        to go.
    Cost: an evaluation of each network for each batch and step; with a folder two more of the quantized one, and four
        tensors of all samples a step.
    """
    x = y = torch.cat([batch.noise for batch in batches])
    forward = [_mover(begun(scheduler), eta, seed) for _ in range(2)]
    attachment = attachment_of(network)
    remembers = attachment is not None and any(layer.inputs is not None for layer in attachment.layers.values())
    job = {"steps": [float(t) for t in scheduler.timesteps], "samples": [len(b.noise) for b in batches],
           "noise": digest_of({}, [x]), "eta": eta, "seed": seed, "settings": settings,
           "network": None if folder is None else _digest(network, batches[0], len(scheduler.timesteps))}  # fmt: skip
    results: list[dict[str, Tensor]] = []
    with ExitStack() as stack:
        shards = None if folder is None else stack.enter_context(ResumableFolder(folder, job))
        if attachment is not None:
            stack.enter_context(model_trajectory(network))
        for index, timestep in enumerate(Bar(scheduler.timesteps, desc="lockstep", unit="step", shown=progress)):
            path = None if shards is None else shards.path / f"step-{index:04d}.safetensors"
            kept = _read(path)
            output = _evaluate(batches, index, y, network, "quantized") if kept is None or remembers else None
            told = _evaluate(batches, index, x, None, "full") if kept is None else kept["full_output"].to(x)
            moves = [lambda o, s, move=move, i=index, t=timestep: move(i, t, o, s) for move in forward]
            step = Step(index, timestep, (x, told, moves[0](told, x)), y, output, moves[1])
            if kept is None:
                kept = _visited(visit, step)
                if path is not None:
                    write_tensors(path, kept, {})
            elif "used" in kept:
                step.advance(kept["used"].to(y))  # the sampler may remember it
            x, y = step.full_next, kept["next"].to(y)
            results.append({n.removeprefix(RESULT): v for n, v in kept.items() if n.startswith(RESULT)})
    return results


def begun(scheduler: Any) -> Any:
    """A scheduler like this one, with its timesteps, before the first step."""
    again = type(scheduler).from_config(scheduler.config)
    for name in ("timesteps", "sigmas", "num_inference_steps", "order_list"):
        if name in vars(scheduler):
            setattr(again, name, vars(scheduler)[name])
    return again


def _digest(network: nn.Module, batch: Batch, steps: int) -> str:
    """Of what the network says of the first state at two steps: modulated layers have no residuals at the first."""
    with nullcontext() if attachment_of(network) is None else model_trajectory(network):
        return digest_of({}, [batch.quantized(step, batch.noise) for step in range(min(2, steps))])


def _visited(visit: Visit, step: Step) -> dict[str, Tensor]:
    result = visit(step)
    check("lockstep.visit", step.next, step.next is not None, "a next state", "Set step.next = step.advance(output).")
    states = {"full_output": step.full_output, "next": step.next, "used": step.used}
    tensors = {n: t.cpu().clone() for n, t in states.items() if t is not None}
    return tensors | {RESULT + name: value.cpu().clone() for name, value in result.items()}


def _read(path: Path | None) -> dict[str, Tensor] | None:
    if path is None or not path.exists():
        return None
    return read_tensors(path, "a finished step", "Delete the folder: its steps are run again.")[0]


def _evaluate(batches: Sequence[Batch], index: int, state: Tensor, network: nn.Module | None, name: str) -> Tensor:
    outputs: list[Tensor] = []
    parts = state.split([len(batch.noise) for batch in batches])
    for number, (batch, part) in enumerate(zip(batches, parts, strict=True)):
        apart = network is not None and attachment_of(network) is not None
        with model_context(network, f"batch {number}") if apart else nullcontext():
            outputs.append(getattr(batch, name)(index, part))
    return torch.cat(outputs)


def _mover(scheduler: Any, eta: float, seed: int) -> Callable[[int, Any, Tensor, Tensor], Tensor]:
    """The steps of one trajectory; the noise of a step depends on the seed and the step alone."""
    known = inspect.signature(scheduler.step).parameters

    def move(index: int, timestep: Any, output: Tensor, state: Tensor) -> Tensor:
        words: dict[str, Any] = {"eta": eta} if "eta" in known else {}
        if "generator" in known:  # far from the seeds of x_T; a generator of the CPU reads 32 bits
            words["generator"] = torch.Generator().manual_seed((2**31 + 100_003 * seed + index) % 2**32)
        return scheduler.step(output, timestep, state, return_dict=False, **words)[0]

    return move
