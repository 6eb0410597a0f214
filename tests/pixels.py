"""A very small unconditional pipeline for tests of metrics and commands: drawn weights, 8x8 grey images."""

from pathlib import Path

import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel


def pixel_pipeline(seed: int = 0) -> DDIMPipeline:
    """DDIM on a U-Net with attention and a downsampler; it predicts v, so random weights keep it in range."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = UNet2DModel(
            sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 16), layers_per_block=1,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=8, norm_num_groups=4,
        )  # fmt: skip
        for parameter in unet.parameters():
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 100
            torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=fan_in**-0.5)
    pipe = DDIMPipeline(unet=unet.eval(), scheduler=DDIMScheduler(prediction_type="v_prediction", clip_sample=False))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def saved_pipeline(folder: Path) -> Path:
    """The folder of a saved pixel pipeline."""
    pixel_pipeline().save_pretrained(folder)
    return folder
