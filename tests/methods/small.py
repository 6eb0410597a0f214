"""A pipeline of a few thousand weights, for methods that quantize all of it many times."""

from diffusers import DDIMPipeline, UNet2DModel
from torch import Tensor

from tests.hosts.tiny import HOSTS, drawn, make_scheduler


def build() -> DDIMPipeline:
    """Two levels of one residual block, attention in the middle; 17 layers."""
    unet = drawn(
        lambda: UNet2DModel(
            sample_size=8, in_channels=3, out_channels=3, block_out_channels=(8, 16), layers_per_block=1,
            down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
            attention_head_dim=8, norm_num_groups=4,
        ),
        seed=30,
    )  # fmt: skip
    pipe = DDIMPipeline(unet=unet, scheduler=make_scheduler("ddim", "sample"))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call(pipe: DDIMPipeline, steps: int = 5, seed: int = 0, batch: int = 1) -> Tensor:
    """(batch, 3, 8, 8) in 0..1."""
    return HOSTS["ddim"].call(pipe, steps=steps, seed=seed, batch=batch)


def states_of(pipe: DDIMPipeline, steps: int, batch: int) -> list[Tensor]:
    """What the network reads at each step of such a call, float64."""
    states: list[Tensor] = []
    handle = pipe.unet.register_forward_pre_hook(lambda _, args: states.append(args[0].detach().double().clone()))
    call(pipe, steps=steps, batch=batch)
    handle.remove()
    return states
