"""Masked-diffusion text: tokens start as masks and are filled in (MDLM, arXiv:2406.07524), and corrected (ReMDM).

forward    each token is M with probability 1 - α_t, independently;  α_t = 1 - (1 - 0.001) t
t -> s     M becomes a token drawn from the model's p with probability (α_s - (1 - σ) α_t) / (1 - α_t)
           a token becomes M again with probability σ;  σ = 0 is MDLM, σ > 0 is ReMDM (arXiv:2503.00307)
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import ConfigMixin, DiffusionPipeline, ModelMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from torch import Tensor

from modiff.assets.characters import CharacterTransformer
from modiff.config import check, check_count
from modiff.errors import ConfigError
from modiff.hosts import diffusers_host
from modiff.model.attach import attachment_of
from modiff.model.trajectory import model_trajectory
from modiff.sampling.calls import Callback

diffusers_host()  # lets `from_pretrained` read folders of quantized networks

__all__ = [
    "CharacterTransformer", "MaskedScheduler", "MaskedTextOutput", "MaskedTextPipeline", "ModelMixin", "SchedulerMixin",
]  # fmt: skip
"""With what diffusers must have imported to load a saved pipeline: the model of the package, and base classes."""

LEAST = 1e-3
"""α at t = 1."""

RowGenerators = torch.Generator | Sequence[torch.Generator] | None
"""One for all rows, or one for each."""


@dataclass
class MaskedSchedulerOutput(BaseOutput):
    """prev_sample: (rows, length) int64, the tokens at the next time."""

    prev_sample: Tensor


class MaskedScheduler(SchedulerMixin, ConfigMixin):
    """Ancestral sampling of masked diffusion, with float64 chances: n steps from t = 1, all masked, to t = 0, none.

    Args:
        mask_token_id: the token that stands for a mask; the model is never asked to draw it.
        remask: share of the largest σ = min(1, (1 - α_s) / α_t) at which tokens become masks again; 0 is MDLM.
        most_remasked: upper bound of σ (the "cap" of ReMDM, there 0.008 for 1024 steps).
        top_p: tokens are drawn from the fewest that have this much of the probability.
    """

    order = 1

    @register_to_config
    def __init__(self, mask_token_id: int, remask: float = 0.0, most_remasked: float = 1.0, top_p: float = 1.0) -> None:
        check("MaskedScheduler.mask_token_id", mask_token_id, mask_token_id >= 0, "0 or more", "It is a token.")
        for name, share in (("remask", remask), ("most_remasked", most_remasked)):
            check(f"MaskedScheduler.{name}", share, 0 <= share <= 1, "0 to 1", "It is a probability. 0 is MDLM.")
        check("MaskedScheduler.top_p", top_p, 0 < top_p <= 1, "more than 0, 1 at most", "1 draws from all tokens.")
        self.set_timesteps(64)

    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
        """Steps of equal length; `timesteps` are their numbers, as for the discrete schedulers of diffusers."""
        check_count("num_inference_steps", num_inference_steps, "None samples nothing.")
        self.num_inference_steps = num_inference_steps
        self.timesteps = torch.arange(num_inference_steps, device=device)

    def chances(self, step: int) -> tuple[float, float]:
        """(unmask, remask): of a mask to become a token, and of a token to become a mask, in a step."""
        now, then = (1 - (1 - LEAST) * (1 - i / self.num_inference_steps) for i in (step, step + 1))
        remask = min(self.config.remask * min(1.0, (1 - then) / now), self.config.most_remasked)
        return (then - (1 - remask) * now) / (1 - now), remask

    def probabilities(self, logits: Tensor) -> Tensor:
        """p of each token, float64, (..., vocabulary): none for the mask, none beyond `top_p`."""
        logits = logits.double().index_fill(
            -1, torch.tensor(self.config.mask_token_id, device=logits.device), -torch.inf
        )
        p = logits.softmax(-1)
        if self.config.top_p < 1:
            ordered, order = p.sort(-1, descending=True)
            beyond = ordered.cumsum(-1) - ordered >= self.config.top_p
            p = p.masked_fill(beyond.gather(-1, order.argsort(-1)), 0)
        return p / p.sum(-1, keepdim=True)

    def step(
        self, model_output: Tensor, timestep: int | Tensor, sample: Tensor, generator: RowGenerators = None,
        return_dict: bool = True,
    ) -> MaskedSchedulerOutput | tuple[Tensor]:  # fmt: skip
        """The tokens at the next time.

        Args:
            model_output: logits (rows, length, vocabulary). timestep: the number of the step. sample: (rows, length).
        """
        unmask, remask = self.chances(int(timestep))
        drawn = categorical(self.probabilities(model_output), generator)
        chance, masked = uniform(sample, generator), sample == self.config.mask_token_id
        kept = torch.where(~masked & (chance < remask), self.config.mask_token_id, sample)
        prev_sample = torch.where(masked & (chance < unmask), drawn, kept)
        return MaskedSchedulerOutput(prev_sample) if return_dict else (prev_sample,)


def uniform(like: Tensor, generator: RowGenerators) -> Tensor:
    """float64 in [0, 1), of the shape of `like`; with a generator for each row (else ConfigError), its own row."""
    if generator is None or isinstance(generator, torch.Generator):
        device = like.device if generator is None else generator.device
        return torch.rand(like.shape, dtype=torch.float64, device=device, generator=generator).to(like.device)
    check("generator", len(generator), len(generator) == len(like), f"one, or one for each of {len(like)} rows", "")
    return torch.cat([uniform(row[None], each) for row, each in zip(like, generator, strict=True)])


def categorical(probabilities: Tensor, generator: RowGenerators) -> Tensor:
    """An index of the last axis for each of the others, by its probability."""
    total = probabilities.cumsum(-1)
    at = uniform(total[..., 0], generator) * total[..., -1]
    return (total <= at[..., None]).sum(-1).clamp_max(total.shape[-1] - 1)


def running(model: Any) -> AbstractContextManager[None]:
    """A trajectory of a model with quantized layers, whichever pipeline modiff was applied to, unless one runs."""
    attachment = attachment_of(model)
    return nullcontext() if attachment is None or attachment.clock.active else model_trajectory(model)


@dataclass
class MaskedTextOutput(BaseOutput):
    """sequences: (rows, length) tokens. texts: of the rows, if the model decodes. evaluations: of the network."""

    sequences: Tensor
    texts: list[str] | None
    evaluations: int


class MaskedTextPipeline(DiffusionPipeline):
    """Text from a masked-diffusion model.

    Where no token changed in a step, the next one has the logits already: they are a function of the tokens alone. A
    model of quantized layers is not evaluated then either.

    model: anything that maps (rows, length) int64 tokens to an object with `.logits` (rows, length, vocabulary).
    """

    def __init__(self, model: Any, scheduler: MaskedScheduler) -> None:
        super().__init__()
        if not isinstance(scheduler, MaskedScheduler):
            raise ConfigError(
                f"{type(self).__name__}: expected a MaskedScheduler, got {type(scheduler).__name__}. Masks become "
                "tokens, no noise is removed. Use modiff.sampling.masked.MaskedScheduler(mask_token_id=...)."
            )
        mask, words = scheduler.config.mask_token_id, getattr(getattr(model, "config", None), "vocab_size", None)
        known = getattr(model, "mask_token_id", None)
        for expected, valid in (
            (f"{known}, the model's", known is None or mask == known),
            (f"a token of the model, 0 to {(words or 0) - 1}", words is None or mask < words),
        ):
            check(
                f"{type(self).__name__}.scheduler: mask_token_id", mask, valid, expected, "Positions of it are masked."
            )
        self.register_modules(model=model, scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self, batch_size: int = 1, length: int = 128, num_inference_steps: int = 64, input_ids: Tensor | None = None,
        generator: RowGenerators = None, return_dict: bool = True, callback_on_step_end: Callback | None = None,
    ) -> MaskedTextOutput | tuple[Tensor, list[str] | None, int]:  # fmt: skip
        """Fill in what is masked.

        Args:
            input_ids: (rows, length) int64 whose masks are filled in, whatever batch_size and length say.
            generator: with one for each row, a row is the same in any batch.
            callback_on_step_end: as diffusers have it; of {"tokens": (rows, length)}, which what it returns replaces.
        Cost: an evaluation a step at most.
        """
        self.scheduler.set_timesteps(num_inference_steps)
        start = tokens = self.masks(batch_size, length, input_ids)
        logits, evaluations, prompt = None, 0, start != self.scheduler.config.mask_token_id
        with running(self.model):
            for step in self.progress_bar(self.scheduler.timesteps):
                if logits is None:
                    logits, evaluations = self.logits(tokens), evaluations + 1
                filled = self.scheduler.step(logits, step, tokens, generator, return_dict=False)[0]
                filled = torch.where(prompt, start, filled)
                if callback_on_step_end is not None:
                    filled = callback_on_step_end(self, int(step), step, {"tokens": filled}).get("tokens", filled)
                tokens, logits = filled, logits if torch.equal(filled, tokens) else None
        texts = self.texts(tokens)
        return MaskedTextOutput(tokens, texts, evaluations) if return_dict else (tokens, texts, evaluations)

    def masks(self, rows: int, length: int, input_ids: Tensor | None) -> Tensor:
        """The tokens at the start. Raises: ConfigError for input_ids that are no rows of tokens."""
        mask, model = self.scheduler.config.mask_token_id, self.model
        known = hasattr(model, "device")  # a module of torch says no device, its weights do
        device = self._execution_device if known else next((w.device for w in model.state_dict().values()), None)
        if input_ids is None:
            for name, count in (("batch_size", rows), ("length", length)):
                check_count(f"{type(self).__name__}.{name}", count, "None samples nothing.")
            return torch.full((rows, length), mask, device=device)
        tensor = isinstance(input_ids, Tensor)
        if not tensor or input_ids.dim() != 2 or input_ids.dtype != torch.int64 or not input_ids.numel():
            got = f"{tuple(input_ids.shape)} {input_ids.dtype}" if tensor else type(input_ids).__name__
            raise ConfigError(
                f"{type(self).__name__}.input_ids: expected (rows, length) int64 tokens, got {got}. "
                f"Positions of token {mask} are filled in. Stack rows of one length."
            )
        return input_ids.to(device)

    def logits(self, tokens: Tensor) -> Tensor:
        """Of all positions. Raises: ConfigError for a model that returns something else."""
        output = self.model(tokens)
        logits = getattr(output, "logits", None)
        mask = self.scheduler.config.mask_token_id
        if not isinstance(logits, Tensor) or logits.shape[:-1] != tokens.shape or logits.shape[-1] <= mask:
            got = tuple(logits.shape) if isinstance(logits, Tensor) else type(output).__name__
            shape = (*tokens.shape, f"more than {mask}")
            raise ConfigError(
                f"{type(self).__name__}.model: expected .logits of shape {shape}, got {got}. Every position needs the "
                "scores of all tokens, the mask among them. Check the model and mask_token_id."
            )
        if logits.isnan().any():
            raise ConfigError(
                f"{type(self).__name__}.model: logits: expected scores, got NaN. No token can be drawn by them. "
                "Look at the model's weights, or run it in float32."
            )
        return logits

    def texts(self, tokens: Tensor) -> list[str] | None:
        """What the rows say, if the model knows letters."""
        decode = getattr(self.model, "decode", None)
        return None if decode is None else [decode(row) for row in tokens]
