"""Names that many networks share, those of diffusers above all: what they say of layers, blocks and concatenations."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from modiff.nn.adapters import modules_of

DEFAULT_EXCLUDE = (
    "*time_*emb*",
    "*timestep_emb*",
    "*time_proj*",
    "*time_step_proj*",
    "*t_embedder*",
    "*guidance*",
    "*modulation*",
    "*_mod.?",
    "*condition_embedder*",
    "*add_embedding*",
    "*class_embed*",
    "*caption_projection*",
    "*context_embedder*",
    "*adaln_single*",
    "*norm*.linear*",
    "*cap_embedder*",
    "encoder_hid_proj*",
    "*x_embedder*",
    "img_in",
    "txt_in",
    "proj_in",
    "pos_embed*",
    "patch_embed*",
    "proj_out",
    "proj_out_?",
)
"""Layers that read only the time step, the class or the prompt (a few rows, no cost, large effect), and the way into a
transformer and out of it."""

UNBATCHED = ("txt_ids", "img_ids", "image_rotary_emb", "freqs_cis")
"""Arguments that have no batch axis: positions."""

BLOCK_CLASSES = (
    "*ResnetBlock*",  # U-Nets
    "*ResNetBlock",
    "*ResBlock",
    "*Transformer*Block*",  # Basic-, Joint-, Flux-, FluxSingle-, Wan-, LTXVideo-, Sana-, ...
    "*DiTBlock",
    "*AttentionBlock",
    "*AttnBlock",
    "*Attention",  # those of a U-Net without transformers; others lie inside a block
    "CogVideoXBlock",
    "ConsisIDBlock",
    "HiDreamBlock",
    "OmniGenBlock",
    "PRXBlock",
    "UVitBlock",
    "AuraFlowPreFinalBlock",
    "HunyuanVideo*RefinerBlock",
)
"""Patterns on class names of what is learned as a whole.

The outermost match is the unit: a FluxAttention belongs to its FluxTransformerBlock.

As in Q-Diffusion's code: residual, transformer and attention blocks; everything else layer by layer.
"""


def shortcut_splits(model: nn.Module) -> dict[str, int]:
    """Channel index of the concatenation for each layer that reads one (Q-Diffusion, section 4.2: split shortcut).

    A U-Net pushes the output of `conv_in`, of every down-block residual block and of every downsampler, and each
    residual block of the up path pops one: its input is [decoder stream, skip], cut at in_channels - skip channels.
    Returns: {} for a model that is not such a U-Net.
    """
    modules = modules_of(model)  # a LoRA may be around a layer

    def named(pattern: str) -> dict[str, Any]:
        return {name: module for name, module in modules.items() if re.fullmatch(pattern, name)}

    skips: list[int] = []
    for module in (named("conv_in") | named(r"down_blocks\.\d+\.(resnets\.\d+\.conv2|downsamplers)")).values():
        skips += skips[-1:] if isinstance(module, nn.ModuleList) else [getattr(module, "out_channels", 0)]
    resnets, splits = named(r"up_blocks\.\d+\.resnets\.\d+"), dict[str, int]()
    for name, skip in zip(resnets, reversed(skips), strict=False):
        for leaf in ("conv1", "conv_shortcut"):
            layer = modules.get(f"{name}.{leaf}")
            if isinstance(layer, nn.Conv2d) and 0 < skip < layer.in_channels:
                splits[f"{name}.{leaf}"] = layer.in_channels - skip
    return splits if len(skips) == len(resnets) else {}
