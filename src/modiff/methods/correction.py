"""What PTQD and TAC share: trajectories of both networks side by side, and a table that the sampler gets."""

import copy
import dataclasses
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from modiff.calibration.reconstruct.layers import evaluating
from modiff.config import WeightSearch, check
from modiff.hosts.host import networks_of
from modiff.methods.q_diffusion import QDiffusionConfig, learn_layers
from modiff.methods.recipe import MethodJob, MethodReport
from modiff.methods.sampler_steps import SamplerSteps, record
from modiff.model.trajectory import clone
from modiff.sampling.lockstep import Batch, Step, begun, lockstep

Results = list[dict[str, Tensor]]


@dataclass(frozen=True, kw_only=True)
class CorrectionConfig(QDiffusionConfig):
    """Settings of a network that is quantized as by Q-Diffusion, and then corrected step by step.

    The network is rounded to nearest with min-max ranges if nothing else is said: rounding="learned", search="mse" and
    scales="learned" are Q-Diffusion's own.

    pairs: trajectories that both networks run, in batches of `batch`. eta: of DDIM; sample with the same.
    guidance_scale: of classifier-free guidance with both branches in one batch; None without guidance.
    """

    rounding: Literal["learned", "nearest"] = "nearest"
    search: WeightSearch = "minmax"
    scales: Literal["learned", "measured"] = "measured"
    pairs: int = 1024
    eta: float = 0.0
    guidance_scale: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("pairs", self.pairs >= 1 and self.pairs % self.batch == 0, f"a multiple of batch={self.batch}",
                   "Trajectories run in whole batches.")  # fmt: skip
        self.check("eta", 0 <= self.eta <= 1, "0 to 1", "0 is DDIM without noise, 1 has the noise of DDPM.")

    @classmethod
    def quick(cls) -> Self:
        """For the embedded model and others of its size, in minutes on two cores."""
        return dataclasses.replace(super().quick(), pairs=64)

    @abstractmethod
    def visit(self, step: Step) -> dict[str, Tensor]:
        """What to learn from a step, and where the quantized network goes on from."""

    @abstractmethod
    def table(self, scheduler: Any, results: Results, channel_dim: int) -> Any:
        """The `Correction` of what was learned, for a scheduler with its timesteps set."""


class RecordedSteps(SamplerSteps):
    """Of the samplers that remember outputs or add noise, too: their steps are made by `lockstep`."""

    def takes(self, scheduler: Any) -> bool:
        """Raises: ConfigError for a sampler that no correction can be made for."""
        from modiff.sampling.corrected import corrected_kind  # late: it loads diffusers

        self.kind = corrected_kind(type(scheduler)).kind.__name__
        return self.kind == "DDIMScheduler"

    def advance(self, step: int, state: Tensor, output: Tensor) -> Tensor:
        """The step as the first one, which no earlier output counts in."""
        if self.ddim or self.kind == "FlowMatchEulerDiscreteScheduler":
            return super().advance(step, state, output)
        scheduler, noise = begun(self.scheduler), torch.Generator().manual_seed(0)
        return scheduler.step(output, scheduler.timesteps[step], state, generator=noise, return_dict=False)[0]

    def mismatch(self) -> float:
        """Of the first step alone, where others have a memory; where they add noise, nothing can be compared."""
        if self.ddim or self.kind == "FlowMatchEulerDiscreteScheduler":
            return super().mismatch()
        if self.kind == "DDPMScheduler" or str(self.scheduler.config.get("algorithm_type")).startswith("sde"):
            why = "Which branch comes first is seen in steps without noise. Calibrate with DDIM."
            check("guidance_scale", self.guidance_scale, self.guidance_scale is None, f"None with {self.kind}", why)
            return 0.0
        return float((self.follow(0) - self.recorded[1]).norm() / self.recorded[1].norm())


class Comparison:
    """Full-precision trajectories of a job's pipeline, and a quantized network next to them.

    Raises: ConfigError for a module alone, a corrected sampler, guidance in two calls, or a pipeline that does more
        between two steps.
    Cost: `pairs` trajectories.
    """

    def __init__(self, job: MethodJob, config: CorrectionConfig) -> None:
        self.job, self.config = job, config
        known = getattr(getattr(job.target, "scheduler", None), "correction", None)
        check(f"{type(config).__name__}.scheduler", "one with a correction", known is None, "a plain one",
              "A table is learned from full precision. Use corrected(pipe.scheduler, None).")  # fmt: skip
        self.scheduler, recorded = record(job, config.pairs // config.batch, "trajectories")
        full = clone(job.model)  # shares the weights, and stays as it is
        self.steps = [RecordedSteps(full, self.scheduler, r, config.guidance_scale) for r in recorded]

    def learn(self, network: nn.Module) -> tuple[Any, Results]:
        """The correction of a network that is quantized, by modiff or another library, and the figures of each step.

        Cost: an evaluation of both networks for each batch and step.
        """
        quantized = [copy.copy(steps) for steps in self.steps]
        for steps in quantized:
            steps.model = network
        pairs = zip(self.steps, quantized, strict=True)
        batches = [Batch(full.recorded[0], full.evaluate, own.evaluate) for full, own in pairs]
        with evaluating(network):
            results = lockstep(
                self.scheduler, batches, self.config.visit, network=network, eta=self.config.eta, seed=self.config.seed,
                folder=self.job.path("lockstep"), settings=self.config.to_dict(), progress=self.job.progress,
            )  # fmt: skip
        return self.config.table(self.scheduler, results, channel_axis(batches[0].noise)), results


@dataclass(frozen=True)
class CorrectedReport(MethodReport):
    """The layers, and the figures of each step, by name."""

    steps: tuple[tuple[str, tuple[float, ...]], ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, strings and numbers, for JSON."""
        return super().to_dict() | {"steps": {name: list(values) for name, values in self.steps}}

    def __str__(self) -> str:
        ranges = (f"{n}: {min(v):.4g} to {max(v):.4g}, mean {sum(v) / len(v):.4g}" for n, v in self.steps)
        return "\n".join([super().__str__(), *ranges])


def quantize_and_correct(job: MethodJob, config: CorrectionConfig, step_bits: tuple[int, ...] = ()) -> CorrectedReport:
    """Quantize the job's network, learn the table, and give the pipeline a sampler with it.

    step_bits: activation bits of each step that sends codes, instead of the same at all.
    """
    from modiff.sampling.corrected import corrected  # late: it loads diffusers

    comparison = Comparison(job, config)
    report = learn_layers(job, config, config.model_config(job.model, step_bits))
    table, results = comparison.learn(job.model)
    job.target.scheduler = corrected(job.target.scheduler, table)
    figures = tuple((name, tuple(float(r[name].mean()) for r in results)) for name in results[0])
    figures += (("bits", tuple(map(float, step_bits))),) if step_bits else ()
    return CorrectedReport(report.entries, report.memory, report.weights, report.scales, figures)


def learn_correction(
    full: Any,
    quantized: Any,
    config: CorrectionConfig,
    *,
    run: Callable[[int], object] | None = None,
    folder: str | Path | None = None,
    progress: bool = True,
) -> Any:
    """The correction of a pipeline or network that another library quantized, or modiff by other settings.

        pipe.scheduler = corrected(pipe.scheduler, learn_correction(full_pipe, pipe, TacConfig.quick()))

    Args:
        full: the pipeline in full precision, with the sampler that is to be corrected. quantized: the same pipeline
            quantized, or its network. config: its bits are not used.
        folder: keeps finished steps of these settings and this network; others are refused.
        run: `run(i)` generates the `config.batch` images of trajectory i with `full`; for pipelines that take a prompt.
    Raises: ConfigError or StateError for what cannot be compared. Cost: as `Comparison` and its `learn`.
    """
    job = MethodJob(full, config, run, None, None if folder is None else Path(folder), progress)
    network = next(iter(networks_of(quantized).values()))
    return Comparison(job, config).learn(network)[0]


def moments_by_channel(value: Tensor) -> Tensor:
    """Means over all but the channels, (C,), float64."""
    axis = channel_axis(value)
    return value.double().movedim(axis, 0).flatten(1).mean(1)


def channel_axis(value: Tensor) -> int:
    """-1 for packed tokens (N, tokens, C), else 1."""
    return -1 if value.dim() == 3 else 1


def row_table(results: Results, name: str) -> Tensor:
    """The rows of a figure, (T, C) or (T, 1), float64."""
    return torch.stack([result[name].double().reshape(-1) for result in results])
