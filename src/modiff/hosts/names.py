"""Names that many networks share, those of diffusers above all: what they say of layers, blocks and concatenations."""

import functools
import inspect
import re
from typing import Any

import torch
from torch import nn

from modiff.nn.adapters import modules_of

_WAYS = ("img_in", "txt_in", "proj_in", "pos_embed*", "patch_embed*", "proj_out", "proj_out_?", "*final_layer*",
         "*out_layer.out_layer", "audio_proj_in", "audio_proj_out", "continuous_inputs_projection")  # fmt: skip

DEFAULT_EXCLUDE = (
    "*time_*emb*", "*timestep_emb*", "*time_proj*", "*timestep_proj*", "*time_step_proj*", "*t_embedder*", "*guidance*",
    "*modulation*", "*_mod.?", "*condition_embedder*", "*add_embedding*", "*class_embed*", "*caption_projection*",
    "*context_embedder*", "*adaln_single*", "*norm*.linear*", "*cap_embedder*", "encoder_hid_proj*", "*x_embedder*",
    *_WAYS, "*t_embedding*", "*time_in*", "*time_mlp*", "*context_mlp*", "*pooled*embed*", "*mapper*",
    "av_cross_attn_*", "*adaln_global*", "*emb_layers*", "*temb*", "*label_emb*", "map_layer*", "map_label*",
    "map_augment*", "*.affine", "mapping.*", "*y_embedder*", "*conditioning_emb*", "time_mod_proj", "time_token*",
    "t_block*",
)  # fmt: skip
"""Layers that read only the time step, the class or the prompt (a few rows, no cost, large effect), and the way into a
transformer and out of it."""

ENDS = (*_WAYS, "*x_embedder*", "*conv_in", "*conv_out")
"""Names under which networks of diffusers have their first and last layer."""

UNBATCHED = ("txt_ids", "img_ids", "image_rotary_emb", "freqs_cis")
"""Arguments that have no batch axis: positions."""

_WIDTHS = ("encoder_hid_dim", "caption_channels", "joint_attention_dim", "cross_attention_dim", "text_dim",
           "text_embed_dim", "cap_feat_dim")  # fmt: skip

BLOCK_CLASSES = (
    "*ResnetBlock*", "*ResNetBlock", "*ResBlock", "*Transformer*Block*", "*DiTBlock", "*AttentionBlock", "*AttnBlock",
    "*Attention", "CogVideoXBlock", "ConsisIDBlock", "HiDreamBlock", "OmniGenBlock", "PRXBlock", "UVitBlock",
    "AuraFlowPreFinalBlock", "HunyuanVideo*RefinerBlock",
)  # fmt: skip
"""Patterns on class names of what is learned as a whole, as in Q-Diffusion's code: residual, transformer and attention
blocks; everything else layer by layer. The outermost match is the unit."""


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


def example_inputs(
    network: nn.Module, sample: torch.Tensor | None = None, *, rows: int | None = None, length: int | None = None
) -> dict[str, Any] | None:
    """Arguments of one evaluation of a model in diffusers' names, for one image of the size that it was trained on.

    Models that read a prompt or a class evaluate two rows, with and without it. None for other networks, and those
    whose config names no size, as Flux' and models of videos, unless it is given:

    sample: one row of the input, of any size. rows, length: of the prompt, and its tokens.
    """
    config = getattr(network, "config", None)
    size, channels = (getattr(config, name, None) for name in ("sample_size", "in_channels"))
    names = inspect.signature(network.forward).parameters
    width = next((w for name in _WIDTHS if isinstance(w := getattr(config, name, None), int)), None)
    classes = getattr(config, "num_embeds_ada_norm", None) if "class_labels" in names and width is None else None
    height, wide = size if isinstance(size, (tuple, list)) and len(size) == 2 else (size, size)
    rows = rows or (1 if width is None and classes is None else 2)
    length = length or (77 if "sample" in names else 300)
    dtype = getattr(network, "dtype", None) or next(network.parameters()).dtype  # its first ones may stay in float32
    zeros = functools.partial(torch.zeros, device="meta", dtype=dtype)
    numbers, mask = (torch.ones(shape, dtype=torch.long, device="meta") for shape in ((rows,), (rows, length)))
    if sample is None:
        if not isinstance(height, int) or not isinstance(wide, int) or not isinstance(channels, int):
            return None
        sample = zeros(1, channels, height, wide)
    extra = {"resolution": zeros(rows, 2), "aspect_ratio": zeros(rows, 1)}
    if (time := getattr(config, "addition_time_embed_dim", None)) is not None:
        pooled = config.projection_class_embeddings_input_dim - 6 * time
        extra = {"text_embeds": zeros(rows, pooled), "time_ids": zeros(rows, 6)}
    known = {
        "sample": zeros(rows, *sample.shape[1:]),
        "hidden_states": zeros(rows, *sample.shape[1:]),
        "timestep": numbers,
        "class_labels": None if classes is None else numbers,
        "encoder_hidden_states": None if width is None else zeros(rows, length, width),
        "encoder_attention_mask": mask,
        "encoder_hidden_states_mask": mask,
        "pooled_projections": zeros(rows, getattr(config, "pooled_projection_dim", None) or 1),
        "guidance": zeros(rows) if getattr(config, "guidance_embeds", False) else None,
        "added_cond_kwargs": extra,
        **dict.fromkeys(("original_size", "target_size", "crop_coords"), zeros(rows, 2)),
    }
    return {name: value for name, value in known.items() if name in names and value is not None}
