"""Parallel sampling (ParaDiGMS, arXiv:2305.16317): guess many steps, evaluate them in one batch, correct the guesses.

For states x_b, ..., x_e in a window and steps x_{j+1} = y_j(x_j), one iteration (Picard's) is

    new_b = x_b        new_{j+1} = y_j(x_j) + (new_j - x_j)  =  x_b + Σ_{i=b..j} (y_i(x_i) - x_i)

Row j is final after j iterations at most, and the first sum leaves it with the bits of the sequential sampler. The
window moves on over the rows with |new_{j+1} - x_{j+1}|² <= tolerance² · dim · v_j, v_j the posterior variance of DDPM
at step j.

The steps are the scheduler's own, run through the rows of the window in their order from a copy of its state before
row b, with the noise that it drew there before. So each noise is drawn once, where the sequential sampler draws it, a
solver of second order finds the outputs of the rows before, and spacing, clipping and prediction type are as always.
"""

import copy
import inspect
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import Tensor

from modiff.config import check, check_count
from modiff.sampling.calls import Generators
from modiff.sampling.window import rows_in_call

Evaluate = Callable[[Tensor, Tensor], Tensor]
"""Evaluates the rows of a window: states (N, rows, ...), timesteps (rows,) -> outputs (N, rows, ...)."""
Advanced = Callable[[int, Tensor, Tensor], Tensor | None]
"""Of the steps that are done, the last one's timestep, and the state after it; what takes its place, or None."""
SCHEDULERS = (
    "DDIMScheduler", "DDIMParallelScheduler", "DDPMScheduler", "DDPMParallelScheduler", "DPMSolverMultistepScheduler",
)  # fmt: skip
"""Those that are served: one evaluation a step, and states with the variances of a noise schedule."""


class Sampled(NamedTuple):
    """What `ParallelSampler` returns.

    sample: (N, ...), the last state. iterations: batched evaluations, one after the other. evaluations: rows in all of
    them, for each sample; the sequential sampler has one a step.
    """

    sample: Tensor
    iterations: int
    evaluations: int


class ParallelSampler:
    """A scheduler's sampler with up to `window` steps in one batch; tolerance 0 gives the sequential result.

    Args:
        scheduler: of diffusers: DDIM, DDPM or DPM-Solver++ (multistep), also corrected. It is not changed.
        window: rows in a batch, for each sample.
        tolerance: how far a row may move when it is left, as a share of the noise that DDPM would add there.
    Raises: ConfigError for a scheduler that is not served, a window under 1 or a tolerance under 0.
    Cost: memory for `window` evaluations at a time, and one call of the scheduler's step for each row of each
        iteration. In all about twice the evaluations of the sequential sampler: it gains time only where rows run at
        the same time, on several devices or one that a single row does not fill.
    """

    def __init__(self, scheduler: Any, window: int = 10, tolerance: float = 0.1) -> None:
        name = getattr(scheduler, "kind", type(scheduler)).__name__  # of a corrected one, what it corrects
        why = "Rows of other schedulers have no noise to measure a tolerance by, or no step of their own. Use "
        check("ParallelSampler.scheduler", name, name in SCHEDULERS, f"one of {', '.join(SCHEDULERS)}",
              f"{why}DDIMScheduler.from_config(scheduler.config).")  # fmt: skip
        check_count("ParallelSampler.window", window, "It is the rows in a batch. Use 10.")
        number = isinstance(tolerance, int | float) and tolerance >= 0
        check("ParallelSampler.tolerance", tolerance, number, "0 or more", "0 is exact; use 0.1.")
        self.scheduler, self.window, self.tolerance = scheduler, window, tolerance

    @torch.no_grad()
    def __call__(
        self,
        evaluate: Evaluate,
        noise: Tensor,
        steps: int,
        *,
        generator: Generators = None,
        advanced: Advanced = lambda *_: None,
        **settings: Any,
    ) -> Sampled:
        """Sample from x_T = `noise`, (N, ...).

        Args:
            evaluate: `rows_of(denoise)`; `spread` of several; or any function of states and timesteps.
            steps: of the scheduler. generator: of its noise, one or one for each sample; left where the sequential
                sampler would leave it. advanced: called when the window has moved on, with the steps that are done, the
                timestep of the last one and the state after it, whose place a state that it returns takes.
            settings: of the scheduler's step, such as DDIM's `eta`; a step that does not have one ignores it, as
                pipelines do.
        """
        check_count("ParallelSampler.steps", steps, "None samples nothing.")
        check("ParallelSampler.noise", tuple(noise.shape), len(noise) > 0 and noise.is_floating_point(),
              "1 or more samples of floats", "It is x_T, (N, ...).")  # fmt: skip
        scheduler = copy.copy(self.scheduler)
        scheduler.set_timesteps(steps, device=noise.device)
        times, replayed = scheduler.timesteps, _Steps(scheduler, generator, settings)
        limits = self.tolerance**2 * noise[0].numel() * variances(scheduler).to(noise.device)
        begin, iterations, evaluations = 0, 0, 0
        rows = noise.unsqueeze(1).expand(-1, min(self.window, len(times)) + 1, *noise.shape[1:])
        while begin < len(times):
            now = slice(begin, begin + rows.shape[1] - 1)
            outputs = evaluate(rows[:, :-1], times[now])
            check("ParallelSampler: evaluate", tuple(outputs.shape), outputs.shape[:2] == rows[:, :-1].shape[:2],
                  f"outputs of shape ({len(rows)}, {len(times[now])}, ...)", "Use rows_of(denoise).")  # fmt: skip
            new, moved = replayed.through(outputs, times[now], rows)
            close = (moved <= limits[now]).tolist()
            on = min(1 + [*close, False].index(False), len(close))
            replayed.move(on)
            begin, iterations, evaluations = begin + on, iterations + 1, evaluations + len(close)
            kept, end = new[:, on - 1 :], min(begin + self.window, len(times))
            changed = advanced(begin, times[begin - 1], kept[:, 0])
            kept = kept if changed is None else torch.cat([changed.unsqueeze(1), kept[:, 1:]], 1)
            rows = torch.cat([kept, kept[:, -1:].expand(-1, end - begin + 1 - kept.shape[1], *noise.shape[1:])], 1)
        return Sampled(rows[:, -1], iterations, evaluations)


class _Steps:
    """A scheduler's steps, again and again from the row where the window begins."""

    def __init__(self, scheduler: Any, generator: Generators, settings: dict[str, Any]) -> None:
        names = inspect.signature(scheduler.step).parameters
        self.scheduler, self.settings = scheduler, {name: settings[name] for name in settings if name in names}
        if generator is None:
            generator = torch.Generator().manual_seed(int(torch.randint(2**62, ())))
        self.generators = generator if isinstance(generator, list) else [generator]
        if "generator" in names:
            self.settings["generator"] = generator
        self.before = [self._state()]
        """The state before each row of the window, and after the last."""

    def _state(self) -> tuple[dict[str, Any], list[Tensor]]:
        return _copied(vars(self.scheduler)), [generator.get_state() for generator in self.generators]

    def _return(self, state: tuple[dict[str, Any], list[Tensor]]) -> None:
        vars(self.scheduler).update(_copied(state[0]))
        for generator, at in zip(self.generators, state[1], strict=True):
            generator.set_state(at)

    def through(self, outputs: Tensor, times: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The new states after each of the rows, and how far the farthest sample moved there: |new - old|²."""
        self._return(self.before[0])
        del self.before[1:]
        states: list[Tensor] = []
        moves: list[Tensor] = []
        for i, t in enumerate(times):
            state = self.scheduler.step(outputs[:, i], t, rows[:, i], **self.settings).prev_sample
            state = state + moves[-1] if moves else state
            states.append(state)
            moves.append(state - rows[:, i + 1])
            self.before.append(self._state())
        sizes = [move.flatten(1).double().square().sum(1).amax() for move in moves]
        return torch.stack(states, 1), torch.stack(sizes)

    def move(self, rows: int) -> None:
        """The window begins `rows` later."""
        self.before = [self.before[rows]]
        self._return(self.before[0])


def _copied(state: dict[str, Any]) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, list) else value for name, value in state.items()}


def variances(scheduler: Any) -> Tensor:
    """v_j = (1 - ᾱ_{j+1}) / (1 - ᾱ_j) · (1 - ᾱ_j / ᾱ_{j+1}) for each step j of the timesteps set, (steps,), float64.

    The last step ends without noise, where v is 0: it has that of the step before it, and is not left for equality.
    """
    alphas = scheduler.alphas_cumprod.double().cpu()[scheduler.timesteps.long().cpu()]
    after = torch.cat([alphas[1:], alphas.new_ones(1)])
    values = (1 - after) / (1 - alphas) * (1 - alphas / after)
    values[-1] = values[-2:][0]
    return values


def rows_of(denoise: Evaluate, device: torch.device | str | None = None) -> Evaluate:
    """Evaluate rows with a network: `denoise(x, t)` of a batch (N * rows, ...), rows of one sample next to each other.

    Modulated layers take the rows as their steps, inside `along_window(network)`.

    Args:
        denoise: for example `lambda x, t: unet(x, t).sample`; conditions for x are `c.repeat_interleave(rows, 0)`.
        device: where the network is; None where the samples are.
    """

    @torch.no_grad()
    def evaluate(x: Tensor, t: Tensor) -> Tensor:
        samples, rows = x.shape[:2]
        with rows_in_call(rows):
            output = denoise(x.flatten(0, 1).to(device), t.repeat(samples).to(device))
        return output.unflatten(0, (samples, rows)).to(x.device)

    return evaluate


def spread(evaluators: Sequence[Evaluate]) -> Evaluate:
    """Evaluate runs of rows at the same time, one for each of `evaluators`, in threads.

    An evaluator may be `rows_of(denoise, "cuda:1")`, or a worker: `lambda x, t: ray.get(actor.rows.remote(x, t))`.
    """

    def evaluate(x: Tensor, t: Tensor) -> Tensor:
        runs = x.tensor_split(len(evaluators), 1), t.tensor_split(len(evaluators))
        runs = [run for run in zip(evaluators, *runs, strict=True) if len(run[2])]
        with ThreadPoolExecutor(len(runs)) as pool:
            return torch.cat(list(pool.map(lambda run: run[0](run[1], run[2]), runs)), 1)

    return evaluate
