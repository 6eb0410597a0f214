"""Tiny pipelines whose guidance evaluates the network twice a step: Flux and Wan (see tests/hosts/tiny.py)."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKLWan,
    DiffusionPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
    WanPipeline,
    WanTransformer3DModel,
)

from tests.hosts.parts import (
    NEGATIVE_PROMPT,
    PROMPT,
    TEXT_LENGTH,
    WIDTH,
    call_text,
    clip,
    clip_tokenizer,
    drawn,
    image_vae,
    make_scheduler,
    noise_of,
    run_pipeline,
    t5,
    t5_tokenizer,
    umt5,
)


def build_flux() -> FluxPipeline:
    """A double-stream and a single-stream block, no guidance embedding."""
    transformer = drawn(
        lambda: FluxTransformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=WIDTH,
            pooled_projection_dim=WIDTH,
            axes_dims_rope=(4, 4, 8),
        ),
        seed=18,
    )
    return FluxPipeline(
        scheduler=make_scheduler("flow-euler"),
        vae=image_vae(4),
        text_encoder=clip(),
        tokenizer=clip_tokenizer(),
        text_encoder_2=t5(),
        tokenizer_2=t5_tokenizer(),
        transformer=transformer,
    )


def call_flux(pipe: DiffusionPipeline, steps: int = 4, seed: int = 0, batch: int = 1, **more: Any) -> torch.Tensor:
    """(batch, 16, 16) packed latents: 4 by 4 tokens; true guidance, in two calls a step."""
    settings = {
        "prompt": [PROMPT] * batch,
        "negative_prompt": [NEGATIVE_PROMPT] * batch,
        "true_cfg_scale": 3.0,
        "height": 8,
        "width": 8,
        "max_sequence_length": TEXT_LENGTH,
        "generator": noise_of(seed, batch),
        "num_inference_steps": steps,
        "output_type": "latent",
    }
    return run_pipeline(pipe, settings | more)


def build_wan() -> WanPipeline:
    """Video: a patch convolution in three dimensions, 12 tokens in three latent frames."""
    transformer = drawn(
        lambda: WanTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=4,
            out_channels=4,
            text_dim=WIDTH,
            freq_dim=WIDTH,
            ffn_dim=2 * WIDTH,
            num_layers=2,
            rope_max_seq_len=16,
        ),
        seed=19,
    )
    vae = drawn(
        lambda: AutoencoderKLWan(
            base_dim=4,
            z_dim=4,
            dim_mult=[1, 1, 1, 1],
            num_res_blocks=1,
            temperal_downsample=[False, True, True],
            latents_mean=[0.0] * 4,
            latents_std=[1.0] * 4,
        ),
        seed=20,
    )
    return WanPipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=umt5(),
        vae=vae,
        scheduler=make_scheduler("flow-euler"),
        transformer=transformer,
    )


def call_wan(pipe: DiffusionPipeline, steps: int = 4, seed: int = 0, batch: int = 1, **more: Any) -> torch.Tensor:
    """(batch, 4, 3, 4, 4) latents of nine frames; guidance in two calls a step."""
    video = {"height": 32, "width": 32, "num_frames": 9, "max_sequence_length": TEXT_LENGTH}
    return call_text(pipe, steps, seed, batch, **video | more)
