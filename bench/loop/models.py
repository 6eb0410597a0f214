"""The models of the loop benchmark, their inputs and their DDIM loop."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel, UNet2DConditionModel, UNet2DModel
from torch import Tensor, nn

from modiff.assets import embedded_folder
from modiff.hosts.diffusers.load import load_pipeline
from modiff.hosts.diffusers.runs import noise_generators

WEIGHTS_SEED = 0
CPU = torch.device("cpu")
Inputs = dict[str, Any]
"""Of a denoiser in addition to x and t: tensors with a row for each condition, or dicts of them."""
Step = Callable[[Tensor, Tensor], Tensor]
"""(x_t, timestep of each row) -> the predicted noise, float32."""


@dataclass(frozen=True)
class LoopModel:
    """What is run: `build` gives (denoiser on a device, its further inputs, scheduler); `timed` of `steps` are taken.

    size: of x on CPUs. gpu_batch: its rows on GPUs, where every step is taken; None where they are the same.
    gpu_only: not run on CPUs unless it is asked for by name.
    pixels: x_0 is an image in [-1, 1] and is compared in [0, 1]; else latents are compared as they are.
    unet: has levels, so DeepCache and OpenVINO's convolutions mean something.
    random_weights: no trained ones exist: speed only.
    """

    name: str
    build: Callable[[torch.device], tuple[nn.Module, Inputs, Any]]
    size: tuple[int, ...]
    steps: int
    timed: int
    pixels: bool = False
    unet: bool = True
    random_weights: bool = True
    gpu_batch: int | None = None
    gpu_only: bool = False

    def on(self, device: str) -> LoopModel:
        """The model as it is run there."""
        if device == "cpu":
            return self
        return dataclasses.replace(self, size=(self.gpu_batch or self.size[0], *self.size[1:]), timed=self.steps)

    def note(self, timed: int) -> str:
        """What a reader of a row must know."""
        weights = "random weights (speed only), " if self.random_weights else ""
        return f"{self.name}: {weights}batch {self.size[0]}, {timed} of {self.steps} steps"


def scheduler_of() -> Any:
    """DDIM with trailing steps: n of 50 and n/2 of 25 end at the same time.

    Without clipping, as SD-1.5 and DiT have it. What random weights predict is no noise, so nearly every pixel would be
    clipped to its sign, and a difference in the last bit of a float would grow to .06 of the image (DDPM's U-Net).
    """
    return DDIMScheduler(timestep_spacing="trailing", clip_sample=False)


def drawn(kind: type[Any], config: dict[str, Any], device: torch.device) -> nn.Module:
    """A model of diffusers with the same random weights each time; drawn on the device, which is faster on a GPU."""
    torch.manual_seed(WEIGHTS_SEED)
    with device:
        return kind(**config).eval()


def of_rows(inputs: Inputs, change: Callable[[Tensor], Tensor]) -> Inputs:
    """Every tensor changed, those inside of dicts too."""
    return {name: of_rows(v, change) if isinstance(v, dict) else change(v) for name, v in inputs.items()}


def repeated(inputs: Inputs, batch: int) -> Inputs:
    """The rows of each tensor in turn, as many as the batch has."""
    return of_rows(inputs, lambda rows: rows[torch.arange(batch) % len(rows)])


def embedded(device: torch.device = CPU) -> tuple[nn.Module, Inputs, Any]:
    pipe: Any = load_pipeline(embedded_folder(), device=str(device))
    return pipe.unet.eval(), {}, DDIMScheduler.from_config(pipe.scheduler.config)


def ddpm_cifar10(device: torch.device = CPU) -> tuple[nn.Module, Inputs, Any]:
    """google/ddpm-cifar10-32: 35.7M parameters (Ho et al. 2020)."""
    config = {
        "sample_size": 32,
        "block_out_channels": (128, 256, 256, 256),
        "layers_per_block": 2,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": None,
        "norm_eps": 1e-6,
        "downsample_padding": 0,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
    }
    return drawn(UNet2DModel, config, device), {}, scheduler_of()


def sd15(device: torch.device = CPU) -> tuple[nn.Module, Inputs, Any]:
    """Stable Diffusion 1.5's U-Net: 860M parameters; two rows of 77 text embeddings."""
    config = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
    model = drawn(UNet2DConditionModel, config, device)
    text = torch.randn(2, 77, 768, generator=torch.Generator().manual_seed(1))
    return model, {"encoder_hidden_states": text}, scheduler_of()


def sdxl(device: torch.device = CPU) -> tuple[nn.Module, Inputs, Any]:
    """SDXL's U-Net at 1024x1024 pixels: 2.57 billion parameters, 128x128 latents; text, pooled text and sizes."""
    config = {
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 6 * 256 + 1280,
    }
    generator = torch.Generator().manual_seed(1)
    text, pooled = torch.randn(2, 77, 2048, generator=generator), torch.randn(2, 1280, generator=generator)
    sizes = torch.tensor([[1024.0, 1024.0, 0.0, 0.0, 1024.0, 1024.0]])
    further = {"encoder_hidden_states": text, "added_cond_kwargs": {"text_embeds": pooled, "time_ids": sizes}}
    return drawn(UNet2DConditionModel, config, device), further, scheduler_of()


def dit_xl(device: torch.device = CPU) -> tuple[nn.Module, Inputs, Any]:
    """DiT-XL/2 at 256x256 pixels: 28 blocks of width 1152 on 32x32 latents, 256 tokens."""
    config = {"num_layers": 28, "num_attention_heads": 16, "attention_head_dim": 72, "in_channels": 4,
              "out_channels": 8, "sample_size": 32, "patch_size": 2}  # fmt: skip
    return drawn(DiTTransformer2DModel, config, device), {"class_labels": torch.tensor([1, 2])}, scheduler_of()


def tiny(device: torch.device = CPU) -> tuple[nn.Module, Inputs, Any]:
    """For tests."""
    config = {"sample_size": 8, "in_channels": 1, "out_channels": 1, "block_out_channels": (8, 16),
              "layers_per_block": 1, "norm_num_groups": 4, "attention_head_dim": 8,
              "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
              "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}  # fmt: skip
    return drawn(UNet2DModel, config, device), {}, scheduler_of()


MODELS = {
    m.name: m
    for m in (
        LoopModel("embedded", embedded, (16, 1, 32, 32), 50, 50, pixels=True, random_weights=False),
        LoopModel("ddpm-cifar10", ddpm_cifar10, (8, 3, 32, 32), 50, 50, pixels=True, gpu_batch=256),
        LoopModel("sd15", sd15, (2, 4, 64, 64), 50, 6),
        LoopModel("sdxl", sdxl, (4, 4, 128, 128), 50, 6, gpu_only=True),
        LoopModel("dit-xl", dit_xl, (2, 4, 32, 32), 50, 6, unet=False, gpu_batch=32),
    )
}
HIDDEN = {"tiny": LoopModel("tiny", tiny, (2, 1, 8, 8), 10, 10, pixels=True)}
"""Not in the default, not in the help."""


@dataclass
class Loop:
    """One model under one way to evaluate it: `run` is one denoising loop from the noise of a seed."""

    model: LoopModel
    scheduler: Any
    steps: int
    timed: int
    device: torch.device
    seconds: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.scheduler.set_timesteps(self.steps)

    def noise(self, seed: int) -> Tensor:
        """x_T: row i from the noise of seed + i, the same in every process and on every device."""
        _, *shape = self.model.size
        rows = [torch.randn(shape, generator=g) for g in noise_generators(seed, range(self.model.size[0]))]
        return torch.stack(rows)

    def run(self, step: Step, seed: int, timed: int | None = None) -> Tensor:
        """The last x, on the CPU, in [0, 1] for pixels. `seconds` holds the time of each step afterwards."""
        x = self.noise(seed).to(self.device) * self.scheduler.init_noise_sigma
        self.seconds = []
        for t in self.scheduler.timesteps[: self.timed if timed is None else timed]:
            start = time.perf_counter()
            timesteps = t.expand(len(x)).contiguous().to(self.device)
            x = self.scheduler.step(step(x, timesteps), t, x).prev_sample
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            self.seconds.append(time.perf_counter() - start)
        return ((x / 2 + 0.5).clamp(0, 1) if self.model.pixels else x).cpu()
