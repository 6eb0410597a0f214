"""What tiny pipelines are made of: schedulers by name, drawn weights, text encoders and tokenizers made on the spot."""

from __future__ import annotations

import re
from collections.abc import Callable
from string import ascii_lowercase
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    SchedulerMixin,
    UniPCMultistepScheduler,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
)

PROMPT, NEGATIVE_PROMPT = "red fox", "dim"
TEXT_LENGTH = 8  # tokens: a letter each for CLIP, a word each for T5, and the marks of start and end
WIDTH = 32  # channels of text and transformers

# ---------------------------------------------------------------------------------------------------------- schedulers

_DISCRETE: dict[str, tuple[type[SchedulerMixin], dict[str, Any]]] = {
    "ddim": (DDIMScheduler, {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}),
    "ddpm": (DDPMScheduler, {"clip_sample": False}),
    "pndm": (PNDMScheduler, {"skip_prk_steps": False}),
    "plms": (PNDMScheduler, {"skip_prk_steps": True, "steps_offset": 1}),
    "dpm++2m": (DPMSolverMultistepScheduler, {}),
    "dpm++2s": (DPMSolverSinglestepScheduler, {}),
    "sde-dpm++": (DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}),
    "euler": (EulerDiscreteScheduler, {}),
    "heun": (HeunDiscreteScheduler, {}),
    "unipc": (UniPCMultistepScheduler, {}),
}
_FLOW: dict[str, tuple[type[SchedulerMixin], dict[str, Any]]] = {
    "flow-euler": (FlowMatchEulerDiscreteScheduler, {"shift": 3.0}),
    "flow-unipc": (
        UniPCMultistepScheduler,
        {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0},
    ),
}
# What the loops of the pipelines can run, by the kind of their result.
LATENT = ("ddim", "ddpm", "pndm", "plms", "dpm++2m", "dpm++2s", "sde-dpm++", "euler", "heun", "unipc")
# DDPMPipeline hands `generator` to step, which PNDM, Heun and UniPC refuse; it scales neither noise nor model input,
# which Euler needs.
PIXEL = ("ddpm", "ddim", "dpm++2m", "dpm++2s", "sde-dpm++")
# DiTPipeline gives step no generator, so samplers that draw noise do not repeat, and does not scale the first noise.
DECODED = ("ddim", "pndm", "plms", "dpm++2m", "dpm++2s", "unipc")


def make_scheduler(name: str, predicts: str = "v_prediction") -> SchedulerMixin:
    """A scheduler by name; the noise schedule is that of Stable Diffusion, flow schedulers bring their own."""
    if name in _FLOW:
        kind, settings = _FLOW[name]
        return kind(**settings)
    kind, settings = _DISCRETE[name]
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    return kind(**betas, prediction_type=predicts, **settings)


def with_scheduler(pipe: DiffusionPipeline, name: str) -> DiffusionPipeline:
    """The same pipeline object, now sampling with another scheduler; what the network predicts stays."""
    pipe.scheduler = make_scheduler(name, pipe.scheduler.config.get("prediction_type", "v_prediction"))
    return pipe


# ------------------------------------------------------------------------------------------------- networks and text


TIMED = re.compile(r"time_emb|timestep_embedder|time_embedder|time_proj|norm\w*\.linear|adaln_single")
MODULATES = re.compile(r"scale_shift_table|(norm\w*\.linear|adaln_single\.linear|time_proj)\.bias")


def randomise(module: torch.nn.Module, seed: int) -> None:
    """Draw every parameter: weights N(0, 1 / fan_in), gains of norms N(1, 0.1²), biases N(0, 0.1²).

    What sees the timestep gets a third of it: from step to step the networks change slowly, as trained ones do.
    What sets adaLN's scale, shift and gate gets N(0, 0.5²): with gates near zero the blocks would hardly count.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if MODULATES.search(name):
                parameter.copy_(0.5 * noise)
            elif parameter.ndim > 1:
                std = parameter[0].numel() ** -0.5
                parameter.copy_(noise * (std / 3 if TIMED.search(name) else std))
            elif name.endswith("weight"):
                parameter.copy_(1 + 0.1 * noise)
            else:
                parameter.copy_(0.1 * noise)


def drawn(make: Callable[[], torch.nn.Module], seed: int) -> Any:
    """A module with drawn weights, in eval mode; the global random state stays as it was."""
    with torch.random.fork_rng(devices=[]):
        module = make()
    randomise(module, seed)
    return module.eval()


def image_vae(latent_channels: int) -> AutoencoderKL:
    """One level: latents and images have the same size."""
    return drawn(
        lambda: AutoencoderKL(
            latent_channels=latent_channels, block_out_channels=(8,), norm_num_groups=4, sample_size=8, shift_factor=0.0
        ),
        seed=1,
    )


def clip_tokenizer() -> CLIPTokenizer:
    tokens = ("<|startoftext|>", "<|endoftext|>", *ascii_lowercase, *(f"{letter}</w>" for letter in ascii_lowercase))
    vocabulary = {token: i for i, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=TEXT_LENGTH)


def t5_tokenizer() -> T5Tokenizer:
    words = f"{PROMPT} {NEGATIVE_PROMPT}".split()
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((f"▁{word}", -2.0) for word in words)]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=TEXT_LENGTH)


def _clip_config() -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=64,
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=TEXT_LENGTH,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )


def clip(seed: int = 2) -> CLIPTextModel:
    return drawn(lambda: CLIPTextModel(_clip_config()), seed)


def clip_with_projection(seed: int) -> CLIPTextModelWithProjection:
    return drawn(lambda: CLIPTextModelWithProjection(_clip_config()), seed)


def t5(width: int = WIDTH) -> T5EncoderModel:
    config = T5Config(vocab_size=16, d_model=width, d_kv=8, d_ff=WIDTH, num_layers=1, num_heads=2)
    return drawn(lambda: T5EncoderModel(config), seed=4)


def umt5() -> UMT5EncoderModel:
    config = UMT5Config(vocab_size=16, d_model=WIDTH, d_kv=8, d_ff=WIDTH, num_layers=1, num_heads=2)
    return drawn(lambda: UMT5EncoderModel(config), seed=4)


def noise_of(seed: int, batch: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed + i) for i in range(batch)]


def run_pipeline(pipe: DiffusionPipeline, settings: dict[str, Any]) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    return pipe(**settings, return_dict=False)[0]


def call_text(pipe: DiffusionPipeline, steps: int = 4, seed: int = 0, batch: int = 1, **more: Any) -> torch.Tensor:
    """(batch, 4, 8, 8) latents."""
    settings = {
        "prompt": [PROMPT] * batch,
        "negative_prompt": [NEGATIVE_PROMPT] * batch,
        "guidance_scale": 3.0,
        "generator": noise_of(seed, batch),
        "num_inference_steps": steps,
        "output_type": "latent",
    }
    return run_pipeline(pipe, settings | more)
