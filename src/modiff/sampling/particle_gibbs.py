"""Text that a reward prefers: particle Gibbs for masked diffusion (PG-DLM), sequential Monte Carlo, best of n.

    target           p*(x0) ~ p(x0) exp(r(x0) / a)                      p: the sampler's own law, a: `temperature`
    partial reward   r_t(x) = a log mean exp(r(x0) / a)                 over x0 ~ the model's p(. | x), or its arg max
    weights          w = exp((r_s(x_s) - r_t(x_t)) / a)                 from one resampling to the next, in logarithms

A sweep carries k particles from all masks to text and resamples them by their weights. In every sweep but the first,
the last particle follows the reference, a trajectory that the sweep before drew, and is not resampled itself. What is
drawn from the ends of a sweep by weight is the next reference: after enough sweeps a sample of p*.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from diffusers.utils import BaseOutput
from torch import Tensor

from modiff.config import check, check_count
from modiff.errors import ConfigError
from modiff.model.attach import attachment_of
from modiff.model.trajectory import reorder
from modiff.sampling.masked import MaskedScheduler, MaskedTextPipeline, ModelMixin, SchedulerMixin, categorical, running

__all__ = ["ModelMixin", "ParticleGibbsOutput", "ParticleGibbsPipeline", "SchedulerMixin"]

Reward = Callable[[Tensor], Tensor]
"""(rows, length) tokens without masks -> (rows,) numbers, the larger the better."""
Partial = Literal["argmax", "sampled"] | Callable[[Tensor, Tensor], Tensor]
"""How r_t is estimated. A function of (rows, length) tokens and p, (rows, length, vocabulary), is r_t itself."""


@dataclass
class ParticleGibbsOutput(BaseOutput):
    """Of each chain: what the last sweep drew, and the best particle of all sweeps, which is no sample of p*.

    sequences, best: (chains, length) tokens. rewards, best_rewards: (chains,). texts: of `sequences`, if the model
    decodes. drawn: (sweeps, chains), rewards of what each sweep drew. evaluations: rows that the network saw, a chain.
    """

    sequences: Tensor
    rewards: Tensor
    texts: list[str] | None
    best: Tensor
    best_rewards: Tensor
    drawn: Tensor
    evaluations: int


@dataclass
class Path:
    """A trajectory of each chain: tokens (steps, chains, length) after each step, partial rewards (steps, chains)."""

    tokens: Tensor
    rewards: Tensor


@dataclass
class Ends:
    """Of a sweep: tokens (chains, k, length), their rewards (chains, k), the index that was drawn (chains,)."""

    tokens: Tensor
    rewards: Tensor
    drawn: Tensor


class _Target:
    """The rewards of particles (chains, k, length), (chains, k) in float64."""

    def __init__(self, reward: Reward, temperature: float, partial: Partial, draws: int, scheduler: MaskedScheduler,
                 generator: torch.Generator | None) -> None:  # fmt: skip
        self.reward, self.temperature, self.partial, self.draws = reward, temperature, partial, draws
        self.scheduler, self.generator = scheduler, generator

    def of(self, tokens: Tensor) -> Tensor:
        """r. Raises: ConfigError if the reward is no finite number for each row."""
        return self._checked(self.reward(tokens.flatten(0, 1)), tokens)

    def before(self, tokens: Tensor, logits: Tensor) -> Tensor:
        """r_t, from the logits of `tokens`, (chains * k, length, vocabulary)."""
        rows, p = tokens.flatten(0, 1), self.scheduler.probabilities(logits)
        if callable(self.partial):
            return self._checked(self.partial(rows, p), tokens)
        masked, a = tokens == self.scheduler.config.mask_token_id, self.temperature
        if self.partial == "argmax":
            return self.of(torch.where(masked, p.argmax(-1).view_as(tokens), tokens))
        fills = [categorical(p, self.generator).view_as(tokens) for _ in range(self.draws)]
        each = torch.stack([self.of(torch.where(masked, fill, tokens)) / a for fill in fills])
        return a * (each.logsumexp(0) - torch.tensor(float(self.draws)).log())

    def _checked(self, rewards: Any, tokens: Tensor) -> Tensor:
        rows = tokens.shape[0] * tokens.shape[1]
        fits = isinstance(rewards, Tensor) and rewards.shape == (rows,) and bool(rewards.isfinite().all())
        if not fits:
            got = f"{tuple(rewards.shape)} {rewards.dtype}" if isinstance(rewards, Tensor) else type(rewards).__name__
            raise ConfigError(
                f"ParticleGibbsPipeline.reward: expected ({rows},) finite numbers for ({rows}, length) tokens, got "
                f"{got}. Weights are exponentials of their differences. Return a tensor with a number for each row."
            )
        return rewards.double().view(tokens.shape[:2])


class ParticleGibbsPipeline(MaskedTextPipeline):
    """Text from p(x0) exp(r(x0) / a). A sweep is a trajectory of quantized layers; resampling reorders their states.

    One sweep is sequential Monte Carlo. One without resampling, every=None, and its best particle are best of n.
    """

    generation = "sweep"

    def __init__(self, model: Any, scheduler: MaskedScheduler) -> None:
        super().__init__(model, scheduler)

    @torch.no_grad()
    def __call__(
        self, reward: Reward, *, temperature: float = 0.1, particles: int = 4, sweeps: int = 4, every: int | None = 5,
        partial: Partial = "argmax", draws: int = 1, chains: int = 1, length: int = 128, num_inference_steps: int = 64,
        input_ids: Tensor | None = None, generator: torch.Generator | None = None, return_dict: bool = True,
    ) -> ParticleGibbsOutput | tuple[Any, ...]:  # fmt: skip
        """Draw from the target.

        Args:
            temperature: a; the smaller it is, the more the reward counts. particles: k, in each chain. sweeps: m.
            every: steps from one resampling to the next; None: none before the end.
            partial: r_t of the arg max of p, quiet but biased, or of `draws` samples of p.
            chains: independent results. input_ids: (chains, length) whose masks are filled in, whatever chains and
                length say.
        Cost: in each sweep and chain, k rows a step for the network, and k draws / every for the reward.
        Raises: ConfigError for settings that sample nothing, or a reward that is no number for each row.
        """
        interval = 1 if every is None else every
        for name, count in (("particles", particles), ("sweeps", sweeps), ("every", interval), ("draws", draws)):
            check_count(f"{type(self).__name__}.{name}", count, "It is a count.")
        where, one = type(self).__name__, generator is None or isinstance(generator, torch.Generator)
        why = "The reference is one of them, and one that nothing can replace is drawn for ever."
        check(f"{where}.particles", particles, particles > 1 or sweeps == 1, "2 or more", why)
        check(f"{where}.reward", reward, callable(reward), "a function of tokens", "It says which text is better.")
        check(f"{where}.temperature", temperature, temperature > 0, "more than 0", "Rewards are divided by it.")
        known = callable(partial) or partial in ("argmax", "sampled")
        check(f"{where}.partial", partial, known, "'argmax', 'sampled' or a function", "r_t is one of these.")
        check(f"{where}.generator", generator, one, "one for all rows", "Particles are drawn together.")
        self.scheduler.set_timesteps(num_inference_steps)
        start = best = self.masks(chains, length, input_ids)
        target = _Target(reward, temperature, partial, draws, self.scheduler, generator)
        best_rewards = torch.full((len(start),), -torch.inf, dtype=torch.float64, device=start.device)
        path, drawn, evaluations = None, list[Tensor](), 0
        for _ in self.progress_bar(range(sweeps)):
            path, ends, rows = self.sweep(start, particles, every, target, path)
            rewards, top = ends.rewards.max(1)
            best = torch.where((rewards > best_rewards)[:, None], _chosen(ends.tokens, top), best)
            best_rewards, evaluations = torch.maximum(best_rewards, rewards), evaluations + rows
            drawn.append(_chosen(ends.rewards, ends.drawn))
            sequences = _chosen(ends.tokens, ends.drawn)
        texts = self.texts(sequences)
        fields = sequences, drawn[-1], texts, best, best_rewards, torch.stack(drawn), evaluations
        return ParticleGibbsOutput(*fields) if return_dict else fields

    def sweep(
        self, start: Tensor, particles: int, every: int | None, target: _Target, reference: Path | None
    ) -> tuple[Path, Ends, int]:
        """From masks to text once. Returns: the path that was drawn, the ends, rows that the network saw in a chain."""
        size = len(start), particles
        tokens = prompts = start.repeat_interleave(particles, 0)
        rewards = torch.zeros(size, dtype=torch.float64, device=start.device)  # alike for all, as they start alike
        logits, evaluations, history = None, 0, list[tuple[Tensor, Tensor, Tensor]]()
        slots = torch.arange(particles, device=start.device).expand(size)
        with running(self.model):
            for step in range(len(self.scheduler.timesteps)):
                if logits is None:
                    logits, evaluations = self.logits(tokens), evaluations + particles
                ancestors = slots
                if every is not None and step and step % every == 0:
                    now = target.before(tokens.view(*size, -1), logits)
                    if reference is not None:
                        now[:, -1] = reference.rewards[step]  # as it was estimated when it was drawn
                    ancestors = categorical(
                        ((now - rewards) / target.temperature).softmax(1)[:, None].expand(*size, -1), target.generator
                    )
                    if reference is not None:
                        ancestors[:, -1] = particles - 1
                    rewards, rows = now.gather(1, ancestors), self._rows(ancestors)
                    tokens, logits = tokens[rows], logits[rows]
                filled = self.scheduler.step(logits, step, tokens, target.generator, return_dict=False)[0]
                filled = torch.where(prompts != self.scheduler.config.mask_token_id, prompts, filled)
                if reference is not None:
                    filled.view(*size, -1)[:, -1] = reference.tokens[step]
                tokens, logits = filled, logits if torch.equal(filled, tokens) else None
                history.append((tokens.view(*size, -1), rewards, ancestors))
        ends = target.of(tokens.view(*size, -1))
        drawn = categorical(((ends - rewards) / target.temperature).softmax(1), target.generator)
        return _traced(history, drawn), Ends(tokens.view(*size, -1), ends, drawn), evaluations

    def _rows(self, ancestors: Tensor) -> Tensor:
        """The row of the batch that each row goes on from; the states of quantized layers go with it."""
        chains, particles = ancestors.shape
        rows = (ancestors + particles * torch.arange(chains, device=ancestors.device)[:, None]).flatten()
        attachment = attachment_of(self.model)
        if attachment is not None and attachment.clock.active:
            reorder(self.model, rows)
        return rows


def _chosen(values: Tensor, index: Tensor) -> Tensor:
    """values[chain, index[chain]] of each chain."""
    return values[torch.arange(len(index), device=index.device), index]


def _traced(history: list[tuple[Tensor, Tensor, Tensor]], index: Tensor) -> Path:
    """The trajectories that end at these particles, back through their ancestors."""
    tokens, rewards = list[Tensor](), list[Tensor]()
    for after, before, ancestors in reversed(history):
        tokens.append(_chosen(after, index))
        rewards.append(_chosen(before, index))
        index = _chosen(ancestors, index)
    return Path(torch.stack(tokens[::-1]), torch.stack(rewards[::-1]))
