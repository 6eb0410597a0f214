"""Tiny, randomly weighted pipelines of every kind we host: built offline, savable, float32.

`HOSTS["flux"].build()` gives a pipeline, with the same weights each time; `.call(pipe, steps=4, seed=0, batch=1)` gives
its result as one tensor and passes further words on. Row i of a batch equals the call with seed + i to float error.

No layer is idle: diffusers starts several at zero, so all parameters are drawn. Networks predict the image or v: where
the noise is predicted, the initial noise drowns what a random network says.
"""

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from string import ascii_lowercase
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from tests.pixels import pixel_pipeline

TEXT_LENGTH = 8  # tokens
WIDTH = 32  # channels of text and transformers


_SAMPLERS: dict[str, tuple[type[SchedulerMixin], dict[str, Any]]] = {
    "ddim": (diffusers.DDIMScheduler, {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}),
    "ddpm": (diffusers.DDPMScheduler, {"clip_sample": False}),
    "pndm": (diffusers.PNDMScheduler, {"skip_prk_steps": False}),
    "plms": (diffusers.PNDMScheduler, {"skip_prk_steps": True, "steps_offset": 1}),
    "dpm++2m": (diffusers.DPMSolverMultistepScheduler, {}),
    "dpm++2s": (diffusers.DPMSolverSinglestepScheduler, {}),
    "sde-dpm++": (diffusers.DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}),
    "euler": (diffusers.EulerDiscreteScheduler, {}),
    "heun": (diffusers.HeunDiscreteScheduler, {}),
    "unipc": (diffusers.UniPCMultistepScheduler, {}),
    "lcm": (diffusers.LCMScheduler, {}),
    "tcd": (diffusers.TCDScheduler, {}),
}
SAMPLERS = tuple(_SAMPLERS)


def make_scheduler(name: str, predicts: str = "v_prediction") -> SchedulerMixin:
    """A scheduler by name, with the noise schedule of Stable Diffusion."""
    kind, settings = _SAMPLERS[name]
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    return kind(**betas, prediction_type=predicts, **settings)


def flow() -> SchedulerMixin:
    return diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)


_TIMED = re.compile(r"time_emb|timestep_embedder|time_embedder|time_proj|norm\w*\.linear|adaln_single")
_MODULATES = re.compile(r"scale_shift_table|(norm\w*\.linear|adaln_single\.linear|time_proj)\.bias")


def drawn(make: Callable[[], nn.Module], seed: int) -> Any:
    """A module in eval mode with weights N(0, 1 / fan_in), gains of norms N(1, 0.1²) and biases N(0, 0.1²).

    What sees the timestep gets a third of it: from step to step the networks change slowly, as trained ones do.
    What sets adaLN's scale, shift and gate gets N(0, 0.5²): with gates near zero the blocks would hardly count.
    """
    with torch.random.fork_rng(devices=[]):  # the global random state stays as it was
        module = make()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if _MODULATES.search(name):
                parameter.copy_(0.5 * noise)
            elif parameter.ndim > 1:
                std = parameter[0].numel() ** -0.5
                parameter.copy_(noise * (std / 3 if _TIMED.search(name) else std))
            else:
                parameter.copy_(0.1 * noise + name.endswith("weight"))
    return module.eval()


def image_vae() -> diffusers.AutoencoderKL:
    """One level: latents and images have the same size."""
    sizes = {"latent_channels": 4, "block_out_channels": (8,), "norm_num_groups": 4, "sample_size": 8}
    return drawn(lambda: diffusers.AutoencoderKL(**sizes, shift_factor=0.0), seed=1)


def clip_tokenizer() -> CLIPTokenizer:
    """A token is a letter."""
    tokens = ("<|startoftext|>", "<|endoftext|>", *ascii_lowercase, *(f"{letter}</w>" for letter in ascii_lowercase))
    vocabulary = {token: i for i, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=TEXT_LENGTH)


def clip() -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=64, hidden_size=WIDTH, intermediate_size=WIDTH, projection_dim=WIDTH, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=TEXT_LENGTH, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    return drawn(lambda: CLIPTextModel(config), seed=2)


def encoders(count: int) -> dict[str, Any]:
    """Something that can be saved for every text encoder and tokenizer of a pipeline that is called with embeddings."""
    numbers = ["", *(f"_{i}" for i in range(2, count + 1))]
    return {f"text_encoder{n}": clip() for n in numbers} | {f"tokenizer{n}": clip_tokenizer() for n in numbers}


def pixels(batch: int) -> dict[str, Any]:
    """(batch, 3, 8, 8) in 0..1."""
    return {"batch_size": batch, "output_type": "pt"}


def classes(batch: int) -> dict[str, Any]:
    """(batch, 3, 8, 8) in 0..1: a DiTPipeline always decodes."""
    return {"class_labels": [207] * batch, "guidance_scale": 3.0, "output_type": "pt"}


def prompts(batch: int) -> dict[str, Any]:
    """(batch, 4, 8, 8) latents."""
    return {"prompt": ["red fox"] * batch, "negative_prompt": ["dim"] * batch, "guidance_scale": 3.0}


def embeddings(batch: int, *, pooled: bool = True, guidance: str = "guidance_scale", **more: Any) -> dict[str, Any]:
    """Of text that was encoded before."""
    text = torch.randn(2, 1, TEXT_LENGTH, WIDTH, generator=torch.Generator().manual_seed(16)).repeat(1, batch, 1, 1)
    settings = {"prompt_embeds": text[0], "negative_prompt_embeds": text[1], guidance: 3.0} | more
    if pooled:
        settings |= {"pooled_prompt_embeds": text[0, :, 0], "negative_pooled_prompt_embeds": text[1, :, 0]}
    return settings


def masked_embeddings(batch: int) -> dict[str, Any]:
    """The prompts have six and three tokens of TEXT_LENGTH."""
    masks = (torch.arange(TEXT_LENGTH) < torch.tensor([6, 3])[:, None]).long()
    named = {"prompt_attention_mask": masks[:1], "negative_prompt_attention_mask": masks[1:]}
    named = {name: mask.repeat(batch, 1) for name, mask in named.items()}
    return embeddings(batch, pooled=False, negative_prompt=None, use_resolution_binning=False, **named)


def network(kind: Callable[..., nn.Module], seed: int, **settings: Any) -> Any:
    return drawn(lambda: kind(**settings), seed)


_UNET = {"sample_size": 8, "block_out_channels": (32, 64), "norm_num_groups": 8}
_PIXELS = {
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": 16,
}
_SIZE = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2, "in_channels": 4}


def build_ddpm() -> DiffusionPipeline:
    """As the CIFAR-10 model of DDPM: asymmetric padding in the downsampler, sines before cosines."""
    padding = {"downsample_padding": 0, "flip_sin_to_cos": False, "freq_shift": 1}
    unet = network(diffusers.UNet2DModel, 10, layers_per_block=1, **padding, **_UNET, **_PIXELS)
    return diffusers.DDPMPipeline(unet=unet, scheduler=make_scheduler("ddpm", "sample"))


def build_ddim() -> DiffusionPipeline:
    """Two resnets a block, the defaults elsewhere."""
    unet = network(diffusers.UNet2DModel, 11, layers_per_block=2, **_UNET, **_PIXELS)
    return diffusers.DDIMPipeline(unet=unet, scheduler=make_scheduler("ddim", "sample"))


def build_stable_diffusion() -> DiffusionPipeline:
    """Convolutional proj_in and proj_out, as in Stable Diffusion 1; guidance batched into one call."""
    unet = network(
        diffusers.UNet2DConditionModel, 12, layers_per_block=1, cross_attention_dim=WIDTH, attention_head_dim=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        **_UNET,
    )  # fmt: skip
    return diffusers.StableDiffusionPipeline(
        vae=image_vae(), unet=unet, scheduler=make_scheduler("ddim"), **encoders(1), safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def build_sdxl() -> DiffusionPipeline:
    """Linear proj_in and proj_out, blocks of one and two transformers, size and pooled text embedded with the time."""
    unet = network(
        diffusers.UNet2DConditionModel, 13, layers_per_block=1, cross_attention_dim=WIDTH, attention_head_dim=(2, 4),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2), use_linear_projection=True, addition_embed_type="text_time",
        addition_time_embed_dim=8, projection_class_embeddings_input_dim=6 * 8 + WIDTH, **_UNET,
    )  # fmt: skip
    return diffusers.StableDiffusionXLPipeline(
        vae=image_vae(), unet=unet, scheduler=make_scheduler("euler"), text_encoder=None, tokenizer=None,
        text_encoder_2=None, tokenizer_2=None, add_watermarker=False,
    )  # fmt: skip


def build_dit() -> DiffusionPipeline:
    """adaLN-Zero per block, classes as condition, eight output channels of which four are the learned variance."""
    more = {"out_channels": 8, "sample_size": 8, "num_embeds_ada_norm": 1000}
    transformer = network(diffusers.DiTTransformer2DModel, 14, **_SIZE, **more)
    return diffusers.DiTPipeline(transformer=transformer, vae=image_vae(), scheduler=make_scheduler("ddim"))


def build_pixart() -> DiffusionPipeline:
    """One adaLN for all blocks, cross attention to masked text."""
    more = {"out_channels": 8, "sample_size": 8, "cross_attention_dim": WIDTH, "caption_channels": WIDTH}
    transformer = network(diffusers.PixArtTransformer2DModel, 15, **_SIZE, **more)
    return diffusers.PixArtAlphaPipeline(
        tokenizer=None, text_encoder=None, vae=image_vae(), transformer=transformer, scheduler=make_scheduler("dpm++2m")
    )


def build_sd3() -> DiffusionPipeline:
    """Joint attention of text and image; block 0 as in 3.5 (a second attention), the last one without a text output."""
    transformer = network(
        diffusers.SD3Transformer2DModel, 17, sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2,
        attention_head_dim=8, num_attention_heads=4, joint_attention_dim=WIDTH, caption_projection_dim=WIDTH,
        pos_embed_max_size=8, pooled_projection_dim=WIDTH, dual_attention_layers=(0,), qk_norm="rms_norm",
    )  # fmt: skip
    return diffusers.StableDiffusion3Pipeline(transformer=transformer, scheduler=flow(), vae=image_vae(), **encoders(3))


def build_flux() -> DiffusionPipeline:
    """A double-stream and a single-stream block, no guidance embedding; true guidance, in two calls a step."""
    transformer = network(
        diffusers.FluxTransformer2DModel, 18, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=WIDTH, pooled_projection_dim=WIDTH, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    return diffusers.FluxPipeline(transformer=transformer, scheduler=flow(), vae=image_vae(), **encoders(2))


def build_wan() -> DiffusionPipeline:
    """Video of 12 tokens in three latent frames: a patch convolution in three dimensions; guidance in two calls."""
    more = {"out_channels": 4, "text_dim": WIDTH, "freq_dim": WIDTH, "ffn_dim": 2 * WIDTH, "rope_max_seq_len": 16}
    transformer = network(diffusers.WanTransformer3DModel, 19, **_SIZE, **more)
    vae = diffusers.AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )  # fmt: skip
    return diffusers.WanPipeline(transformer=transformer, scheduler=flow(), vae=vae, **encoders(1))


def build_wan_of_two() -> DiffusionPipeline:
    """As Wan 2.2: high noise is sampled with `transformer`, low noise with `transformer_2`."""
    parts = build_wan().components
    second = copy.deepcopy(parts["transformer"])
    return diffusers.WanPipeline(**parts | {"transformer_2": second, "boundary_ratio": 0.5})


@dataclass(frozen=True, kw_only=True)
class TinyHost:
    """A kind of pipeline.

    `denoiser` is the attribute that holds the network, `settings` makes the arguments of a call for a batch size,
    `calls_per_step` says how often the pipeline calls the network before each `scheduler.step`.
    """

    name: str
    build: Callable[[], DiffusionPipeline]
    settings: Callable[[int], dict[str, Any]]
    denoiser: str = "transformer"
    calls_per_step: int = 1

    def network(self, pipe: DiffusionPipeline) -> nn.Module:
        return getattr(pipe, self.denoiser)

    def around(self, network: nn.Module) -> DiffusionPipeline:
        """A new pipeline with that network in place of its denoiser."""
        pipe = self.build()
        setattr(pipe, self.denoiser, network)
        return pipe

    def call(self, pipe: DiffusionPipeline, steps: int = 4, seed: int = 0, batch: int = 1, **more: Any) -> Tensor:
        pipe.set_progress_bar_config(disable=True)
        noise = [torch.Generator().manual_seed(seed + i) for i in range(batch)]
        shared = {"num_inference_steps": steps, "generator": noise, "output_type": "latent", "return_dict": False}
        return pipe(**shared | self.settings(batch) | more)[0]


_FLUX = partial(embeddings, guidance="true_cfg_scale", height=8, width=8)
_WAN = partial(embeddings, pooled=False, height=32, width=32, num_frames=9)
HOSTS: dict[str, TinyHost] = {
    host.name: host
    for host in (
        TinyHost(name="ddpm", build=build_ddpm, settings=pixels, denoiser="unet"),
        TinyHost(name="ddim", build=build_ddim, settings=pixels, denoiser="unet"),
        TinyHost(name="sd", build=build_stable_diffusion, settings=prompts, denoiser="unet"),
        TinyHost(name="sdxl", build=build_sdxl, settings=embeddings, denoiser="unet"),
        TinyHost(name="dit", build=build_dit, settings=classes),
        TinyHost(name="pixart", build=build_pixart, settings=masked_embeddings),
        TinyHost(name="sd3", build=build_sd3, settings=embeddings),
        TinyHost(name="flux", build=build_flux, settings=_FLUX, calls_per_step=2),
        TinyHost(name="wan", build=build_wan, settings=_WAN, calls_per_step=2),
    )
}
SMALL = TinyHost(name="small", build=pixel_pipeline, settings=pixels, denoiser="unet")
"""The pipeline of `tests.pixels`, where the kind of host does not matter."""
