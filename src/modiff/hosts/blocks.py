"""The classes of diffusers that are learned as a whole: residual, attention and transformer blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from torch import nn

from modiff.calibration import blocks as _blocks
from modiff.calibration.blocks import Block

KINDS = (
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
"""Patterns on class names. The outermost match is the unit: a FluxAttention belongs to its FluxTransformerBlock.

As in Q-Diffusion's code: residual, transformer and attention blocks; everything else layer by layer.
"""


def blocks_of(
    model: nn.Module,
    *,
    patterns: Sequence[str] = (),
    layers: Iterable[str] | None = None,
    run: Callable[[], object] | None = None,
) -> list[Block]:
    """The units of reconstruction of a diffusers network, or of any that names its classes alike.

    Args:
        patterns, layers, run: as in `modiff.calibration.blocks.blocks_of`.
    Returns: each layer in exactly one unit.
    Raises: ConfigError for a pattern that matches no module with layers.
    """
    return _blocks.blocks_of(model, kinds=KINDS, patterns=patterns, layers=layers, run=run)
