"""Tiny, randomly weighted pipelines of every kind we host: built offline in well under two seconds, savable, float32.

A host is asked for by name, `HOSTS["flux"]`, and has two verbs: `build()` gives a new pipeline, with the same weights
each time; `call(pipe, steps=4, seed=0, batch=1)` gives its result as one tensor. Further words go to the pipeline, as
in `call(pipe, guidance_scale=1.0)`. Row i of a batch starts from the noise of seed + i, and one prompt serves all rows,
so row i equals the call with seed + i and batch 1 to float error.

No layer is idle: diffusers starts several at zero (adaLN gates, last layers), so all parameters are drawn anew.
No network predicts the noise: x_0 = (x - sqrt(1 - a) noise) / sqrt(a) multiplies the initial noise by 15 to 150, which
drowns what a random network says. Pixel hosts predict the image, nearly all of which the clamp to 0..1 spares; the
others the velocity.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    DDIMPipeline,
    DDPMPipeline,
    DiffusionPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)

from tests.hosts.parts import (
    DECODED,
    LATENT,
    PIXEL,
    TEXT_LENGTH,
    WIDTH,
    call_text,
    clip,
    clip_tokenizer,
    clip_with_projection,
    drawn,
    image_vae,
    make_scheduler,
    noise_of,
    run_pipeline,
    t5,
    t5_tokenizer,
)
from tests.hosts.tiny_two_calls import build_flux, build_wan, call_flux, call_wan


@dataclass(frozen=True, kw_only=True)
class TinyHost:
    """A kind of pipeline.

    `denoiser` is the attribute that holds the network, `calls_per_step` how often the pipeline calls it before each
    `scheduler.step` (2: guidance in two calls), `schedulers` the names that its loop can run, for `with_scheduler`.
    """

    name: str
    build: Callable[[], DiffusionPipeline]
    call: Callable[..., torch.Tensor]
    denoiser: str
    schedulers: tuple[str, ...]
    calls_per_step: int = 1


def reload(pipe: DiffusionPipeline, folder: Path) -> DiffusionPipeline:
    """The pipeline, saved to `folder` and loaded from it.

    Parameters are copied into memory of their own. As loaded they are views of the file, not on 64-byte boundaries, and
    CPU kernels then sum in another order: outputs differ by 1e-6 though every weight is equal.
    """
    pipe.save_pretrained(folder)
    loaded = DiffusionPipeline.from_pretrained(folder)
    for component in loaded.components.values():
        if isinstance(component, torch.nn.Module):
            for parameter in component.parameters():
                parameter.data = parameter.data.clone()
    return loaded


# -------------------------------------------------------------------------------------------- pixels, no condition


def _unet2d(seed: int, **settings: Any) -> UNet2DModel:
    return drawn(
        lambda: UNet2DModel(
            sample_size=8,
            in_channels=3,
            out_channels=3,
            block_out_channels=(32, 64),
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=16,
            norm_num_groups=8,
            **settings,
        ),
        seed,
    )


def build_ddpm() -> DDPMPipeline:
    """As the CIFAR-10 model of DDPM: asymmetric padding in the downsampler, sines before cosines."""
    unet = _unet2d(10, layers_per_block=1, downsample_padding=0, flip_sin_to_cos=False, freq_shift=1)
    return DDPMPipeline(unet=unet, scheduler=make_scheduler("ddpm", "sample"))


def build_ddim() -> DDIMPipeline:
    """Two resnets a block, the defaults elsewhere."""
    return DDIMPipeline(unet=_unet2d(11, layers_per_block=2), scheduler=make_scheduler("ddim", "sample"))


def call_pixels(pipe: DiffusionPipeline, steps: int = 4, seed: int = 0, batch: int = 1, **more: Any) -> torch.Tensor:
    """(batch, 3, 8, 8) in 0..1."""
    settings = {
        "batch_size": batch,
        "generator": noise_of(seed, batch),
        "num_inference_steps": steps,
        "output_type": "pt",
    }
    return run_pipeline(pipe, settings | more)


# ------------------------------------------------------------------------------------ latents of a U-Net, with text


def build_stable_diffusion() -> StableDiffusionPipeline:
    """Convolutional proj_in and proj_out, as in Stable Diffusion 1; guidance batched into one call."""
    unet = drawn(
        lambda: UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(32, 64),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=WIDTH,
            attention_head_dim=2,
            norm_num_groups=8,
        ),
        seed=12,
    )
    return StableDiffusionPipeline(
        vae=image_vae(4),
        text_encoder=clip(),
        tokenizer=clip_tokenizer(),
        unet=unet,
        scheduler=make_scheduler("ddim"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def build_sdxl() -> StableDiffusionXLPipeline:
    """Linear proj_in and proj_out, blocks of one and two transformers, size and pooled text embedded with the time."""
    unet = drawn(
        lambda: UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(32, 64),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2),
            cross_attention_dim=2 * WIDTH,
            attention_head_dim=(2, 4),
            norm_num_groups=8,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + WIDTH,
        ),
        seed=13,
    )
    return StableDiffusionXLPipeline(
        vae=image_vae(4),
        text_encoder=clip(),
        text_encoder_2=clip_with_projection(seed=3),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
        unet=unet,
        scheduler=make_scheduler("euler"),
        add_watermarker=False,
    )


# ------------------------------------------------------------------------------------------------- transformers


def build_dit() -> DiTPipeline:
    """adaLN-Zero per block, classes as condition, eight output channels of which four are the learned variance."""
    transformer = drawn(
        lambda: DiTTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=4,
            out_channels=8,
            num_layers=2,
            sample_size=8,
            num_embeds_ada_norm=1000,
        ),
        seed=14,
    )
    return DiTPipeline(transformer=transformer, vae=image_vae(4), scheduler=make_scheduler("ddim"))


def call_dit(pipe: DiffusionPipeline, steps: int = 4, seed: int = 0, batch: int = 1, **more: Any) -> torch.Tensor:
    """(batch, 3, 8, 8) in 0..1: this pipeline always decodes."""
    settings = {
        "class_labels": [207] * batch,
        "guidance_scale": 3.0,
        "generator": noise_of(seed, batch),
        "num_inference_steps": steps,
        "output_type": "pt",
    }
    return run_pipeline(pipe, settings | more)


def build_pixart() -> PixArtAlphaPipeline:
    """One adaLN for all blocks, cross attention to masked text; no text encoder: `call_pixart` brings embeddings."""
    transformer = drawn(
        lambda: PixArtTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=4,
            out_channels=8,
            num_layers=2,
            sample_size=8,
            cross_attention_dim=WIDTH,
            caption_channels=WIDTH,
        ),
        seed=15,
    )
    return PixArtAlphaPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=image_vae(4),
        transformer=transformer,
        scheduler=make_scheduler("dpm++2m"),
    )


def call_pixart(pipe: DiffusionPipeline, steps: int = 4, seed: int = 0, batch: int = 1, **more: Any) -> torch.Tensor:
    """(batch, 4, 8, 8) latents; the prompts have six and three tokens of TEXT_LENGTH."""
    embeddings = torch.randn(2, 1, TEXT_LENGTH, WIDTH, generator=torch.Generator().manual_seed(16))
    masks = (torch.arange(TEXT_LENGTH) < torch.tensor([6, 3])[:, None]).long()
    settings = {
        "prompt_embeds": embeddings[0].repeat(batch, 1, 1),
        "prompt_attention_mask": masks[:1].repeat(batch, 1),
        "negative_prompt": None,
        "negative_prompt_embeds": embeddings[1].repeat(batch, 1, 1),
        "negative_prompt_attention_mask": masks[1:].repeat(batch, 1),
        "guidance_scale": 3.0,
        "use_resolution_binning": False,
        "generator": noise_of(seed, batch),
        "num_inference_steps": steps,
        "output_type": "latent",
    }
    return run_pipeline(pipe, settings | more)


def build_sd3() -> StableDiffusion3Pipeline:
    """Joint attention of text and image; block 0 as in 3.5 (a second attention), the last one without a text output."""
    transformer = drawn(
        lambda: SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=4,
            joint_attention_dim=2 * WIDTH,
            caption_projection_dim=WIDTH,
            pooled_projection_dim=2 * WIDTH,
            pos_embed_max_size=8,
            dual_attention_layers=(0,),
            qk_norm="rms_norm",
        ),
        seed=17,
    )
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=make_scheduler("flow-euler"),
        vae=image_vae(4),
        text_encoder=clip_with_projection(seed=2),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip_with_projection(seed=3),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5(2 * WIDTH),
        tokenizer_3=t5_tokenizer(),
    )


def call_sd3(pipe: DiffusionPipeline, steps: int = 4, seed: int = 0, batch: int = 1, **more: Any) -> torch.Tensor:
    """(batch, 4, 8, 8) latents."""
    return call_text(pipe, steps, seed, batch, **{"max_sequence_length": TEXT_LENGTH} | more)


_ALL = (
    TinyHost(name="ddpm", build=build_ddpm, call=call_pixels, denoiser="unet", schedulers=PIXEL),
    # DDIMPipeline makes whatever it gets a DDIM.
    TinyHost(name="ddim", build=build_ddim, call=call_pixels, denoiser="unet", schedulers=("ddim",)),
    TinyHost(name="sd", build=build_stable_diffusion, call=call_text, denoiser="unet", schedulers=LATENT),
    TinyHost(name="sdxl", build=build_sdxl, call=call_text, denoiser="unet", schedulers=LATENT),
    TinyHost(name="dit", build=build_dit, call=call_dit, denoiser="transformer", schedulers=DECODED),
    TinyHost(name="pixart", build=build_pixart, call=call_pixart, denoiser="transformer", schedulers=LATENT),
    TinyHost(name="sd3", build=build_sd3, call=call_sd3, denoiser="transformer", schedulers=("flow-euler",)),
    TinyHost(
        name="flux",
        build=build_flux,
        call=call_flux,
        denoiser="transformer",
        schedulers=("flow-euler",),
        calls_per_step=2,
    ),
    TinyHost(
        name="wan",
        build=build_wan,
        call=call_wan,
        denoiser="transformer",
        schedulers=("flow-euler", "flow-unipc"),
        calls_per_step=2,
    ),
)
HOSTS: dict[str, TinyHost] = {host.name: host for host in _ALL}
