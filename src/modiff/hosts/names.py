"""Names that many networks share, those of diffusers above all: what they say of layers, blocks and concatenations."""

from __future__ import annotations

from torch import nn

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
    if not all(hasattr(model, part) for part in ("conv_in", "down_blocks", "up_blocks")):
        return {}
    skips = _skip_channels(model)
    splits: dict[str, int] = {}
    for b, block in enumerate(_modules(model, "up_blocks")):
        for r, resnet in enumerate(_modules(block, "resnets")):
            if not skips:
                return {}
            skip = skips.pop()
            for leaf in ("conv1", "conv_shortcut"):
                layer = getattr(resnet, leaf, None)
                if isinstance(layer, nn.Conv2d) and 0 < skip < layer.in_channels:
                    splits[f"up_blocks.{b}.resnets.{r}.{leaf}"] = layer.in_channels - skip
    return {} if skips else splits


def _skip_channels(model: nn.Module) -> list[int]:
    channels = [_out_channels(model.conv_in)]
    for block in _modules(model, "down_blocks"):
        channels += [_out_channels(getattr(r, "conv2", None)) for r in _modules(block, "resnets")]
        channels += channels[-1:] if _modules(block, "downsamplers") else []
    return channels


def _out_channels(layer: object) -> int:
    return int(getattr(layer, "out_channels", 0))


def _modules(parent: nn.Module, name: str) -> list[nn.Module]:
    modules = getattr(parent, name, None)
    return list(modules) if isinstance(modules, nn.ModuleList) else []
