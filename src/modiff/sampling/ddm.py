"""Decoupled diffusion (DDM): the image fades to zero while noise grows from zero, and the network tells both apart."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from diffusers import ConfigMixin, DDPMScheduler, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from modiff.config import check, check_count
from modiff.hosts import diffusers_host
from modiff.sampling.levels import timestep_at

diffusers_host()  # lets `from_pretrained` read folders of quantized networks

Attenuation = Literal["constant", "linear", "const_2"]
_ONE: dict[Attenuation, int] = {"constant": 1, "const_2": 1}
OUTPUTS: dict[str, dict[Attenuation, int]] = {
    "decomposition": {"constant": 2, "const_2": 2, "linear": 3},
    "epsilon": _ONE,
    "v_prediction": _ONE,
    "sample": _ONE,
}
"""Outputs of a network, in multiples of the image's channels, by prediction_type and attenuation."""


class Decomposition(NamedTuple):
    """What a network says that x_t = x_0 + K t^2 / 2 + C t + s_t eps consists of: C, eps, and K, 0 unless linear."""

    slope: Tensor
    noise: Tensor
    curve: Tensor


class DDMScheduler(SchedulerMixin, ConfigMixin):
    """Steps of decoupled diffusion, for U-Nets with two outputs, and for any model that predicts noise.

        x_t = x_0 + H_t + s_t eps,  t in (0, 1]        x_0 + H_1 = 0
        H_t = K t^2 / 2 + C t,  C = -x_0 - K / 2       K = 0 but for linear attenuation
        s_t = sqrt(t), for const_2 t

    One step from t to u, with sig = eta s_u sqrt(1 - s_u^2 / s_t^2):

        x_u = x_0 + H_u + sqrt(s_u^2 - sig^2) eps + sig z

    With a_t = 1 - t and n^2 = a_t^2 + s_t^2, x_t / n is a noisy image of a variance-preserving schedule at the level
    a_t^2 / n^2. The network sees x_t / n and the timestep of that level in the table of betas, between two rows by
    the logarithm of a^2 / s^2, as a float; past the table's last row up to one timestep more.

    Args:
        num_train_timesteps, beta_start, beta_end, beta_schedule, trained_betas: the table, as in other schedulers.
        attenuation: "constant", "linear" or "const_2".
        prediction_type: "decomposition" for a network with outputs [K,] v and eps, each with the channels of the
            image, where v = (a_t eps - s_t x_0) / n stands for C = (s_t v - a_t x_t / n) / n - K / 2. Both say what
            x_0 is: x_t - H_t - s_t eps is taken. "epsilon", "v_prediction" or "sample" for a model of one output,
            without further training: `DDMScheduler.from_config(pipe.scheduler.config)`. It starts at the last row.
        eta: 1 as published, 0 without noise.
        clip_sample: x_0 is kept within +-clip_sample_range. eps is not changed by that.
        last_time: the last step is divided there; 0 leaves it whole. `set_timesteps(n)` counts evaluations: the
            published "n steps" are n + 1.
        rescale_betas_zero_snr, thresholding: False; there so that a model's config is not misread.
    Raises: ConfigError for what it does not know.
    """

    order = 1
    init_noise_sigma = 1.0

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: list[float] | None = None,
        attenuation: Attenuation = "constant",
        prediction_type: str = "epsilon",
        eta: float = 1.0,
        clip_sample: bool = True,
        clip_sample_range: float = 1.0,
        last_time: float = 1e-4,
        rescale_betas_zero_snr: bool = False,
        thresholding: bool = False,
    ) -> None:
        kinds, where = OUTPUTS.get(prediction_type), "DDMScheduler."
        check(f"{where}prediction_type", prediction_type, kinds is not None, f"one of {', '.join(OUTPUTS)}",
              "Its steps need an image and noise. Use a model that predicts noise.")  # fmt: skip
        check(f"{where}attenuation", attenuation, attenuation in (kinds or ()), f"one of {', '.join(kinds or ())}",
              "A model of one output knows no K. Use constant, or prediction_type='decomposition'.")  # fmt: skip
        check(f"{where}eta", eta, 0 <= eta <= 1, "0 to 1", "Noise of a step is at most what the path adds. Use 1.")
        check(f"{where}last_time", last_time, 0 <= last_time < 0.1, "0 up to 0.1", "It ends the path. Use 1e-4.")
        for name, value in (("rescale_betas_zero_snr", rescale_betas_zero_snr), ("thresholding", thresholding)):
            check(f"{where}{name}", value, not value, "False", "These steps do not know it. Use another sampler.")
        table = DDPMScheduler(num_train_timesteps, beta_start, beta_end, beta_schedule, trained_betas)
        self.alphas_cumprod = table.alphas_cumprod
        self._last_row = self._time_of(float(self.alphas_cumprod[-1]))
        self.start = 1.0 if prediction_type == "decomposition" else self._last_row
        self.set_timesteps(num_train_timesteps)

    @property
    def outputs(self) -> int:
        """Outputs of the network, in multiples of the image's channels."""
        return OUTPUTS[self.config.prediction_type][self.config.attenuation]

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Spread as many evaluations evenly over the time from the start to 0."""
        check_count("num_inference_steps", num_inference_steps, "Use 10.")
        self.num_inference_steps = num_inference_steps
        last, whole = self.config.last_time, num_inference_steps == 1
        count = num_inference_steps + (whole or not last)
        self.times = torch.linspace(self.start, 0, count, dtype=torch.float64)
        if last and not whole:
            self.times = torch.cat([self.times[:-1], torch.tensor([last, 0.0], dtype=torch.float64)])
        self.timesteps = self.timestep(self.times[:-1]).to(device, torch.float32)

    def levels(self, time: Tensor) -> tuple[Tensor, Tensor]:
        """a_t and s_t."""
        return 1 - time, time if self.config.attenuation == "const_2" else time.sqrt()

    def timestep(self, time: Tensor) -> Tensor:
        """What the network is told of times in (0, 1]; float64, falling to 0 with the time."""
        time = time.double().cpu()
        a, s = self.levels(time)
        beyond = (time - self._last_row).clamp(0) / (1 - self._last_row)
        return timestep_at(2 * (a / s).log(), self.alphas_cumprod) + beyond

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor) -> Tensor:
        """x_t / sqrt(a_t^2 + s_t^2)."""
        a, s = self.levels(self.times[self._index(timestep)])
        return sample / float((a**2 + s**2).sqrt())

    def add_noise(self, images: Tensor, noise: Tensor, time: Tensor, curve: Tensor | float = 0.0) -> Tensor:
        """x_t of images (N, C, H, W) at times (N,); curve: K."""
        time = _column(time, images)
        a, s = self.levels(time)
        return a * images + curve * (time**2 - time) / 2 + s * noise

    def decompose(self, output: Tensor, sample: Tensor, time: Tensor) -> Decomposition:
        """What an output says of `sample`, at one time or at times (N,). Raises: ConfigError for other channels."""
        outputs, channels = self.outputs, sample.shape[1]
        check("DDMScheduler: the network's output", tuple(output.shape), output.shape[1] == outputs * channels,
              f"{outputs} x {channels} channels", f"It has {outputs} outputs of the image's channels with "
              f"prediction_type={self.config.prediction_type!r}, attenuation={self.config.attenuation!r}. "
              "Set these as the network was trained.")  # fmt: skip
        time = _column(time, sample)
        a, s = self.levels(time)
        n, none = (a**2 + s**2).sqrt(), torch.zeros_like(sample)
        if self.config.prediction_type == "epsilon":
            return Decomposition((s * output - sample) / a, output, none)
        if self.config.prediction_type == "sample":
            return Decomposition(-output, (sample - a * output) / s, none)
        *curves, v, noise = output.chunk(outputs, 1) if outputs > 1 else (output, (s * sample / n + a * output) / n)
        curve = curves[0] if curves else none
        return Decomposition((s * v - a * sample / n) / n - curve / 2, noise, curve)

    def image(self, made: Decomposition, sample: Tensor, time: Tensor) -> Tensor:
        """x_0 = x_t - K t^2 / 2 - C t - s_t eps, not clipped."""
        time = _column(time, sample)
        return sample - made.curve * time**2 / 2 - made.slope * time - self.levels(time)[1] * made.noise

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor]:
        """x at the next time. generator: of z, drawn where eta is not 0."""
        index = self._index(timestep)
        time, until = self.times[index], self.times[index + 1]
        made = self.decompose(model_output, sample, time)
        image = self.image(made, sample, time)
        if self.config.clip_sample:
            image = image.clamp(-self.config.clip_sample_range, self.config.clip_sample_range)
        (_, s), (a, s_next) = self.levels(time), self.levels(until)
        eta, rest = self.config.eta**2, s_next**2 / s**2
        variance = eta * s_next**2 * (1 - rest)
        kept = float(s_next * (1 - eta + eta * rest).sqrt())  # sqrt(s_u^2 - variance) without cancellation
        after = float(a) * image + float((until**2 - until) / 2) * made.curve + kept * made.noise
        if variance > 0:
            z = randn_tensor(sample.shape, generator=generator, device=sample.device, dtype=sample.dtype)
            after = after + float(variance.sqrt()) * z
        return SchedulerOutput(prev_sample=after) if return_dict else (after,)

    def __len__(self) -> int:
        return self.config.num_train_timesteps

    def _index(self, timestep: float | Tensor) -> int:
        return int((self.timesteps - timestep).abs().argmin())

    def _time_of(self, level: float) -> float:
        """The time with a^2 / (a^2 + s^2) = level: a = r s with r^2 = level / (1 - level)."""
        r = math.sqrt(level / (1 - level))
        if self.config.attenuation == "const_2":
            return 1 / (1 + r)
        return (math.sqrt(r**2 / 4 + 1) - r / 2) ** 2  # 1 - q^2 = r q with q = sqrt(t)


def _column(time: Tensor, sample: Tensor) -> Tensor:
    return time.to(sample).reshape(-1, *(1,) * (sample.dim() - 1))
