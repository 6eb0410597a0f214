"""Put packed layers into a model as a checkpoint names them, before their weights are there."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from modiff.config import LayerConfig, ModiffConfig
from modiff.errors import StateError
from modiff.model.apply import replace_layers
from modiff.model.attach import Attachment, attachment_of
from modiff.model.report import Entry, Report
from modiff.model.select import CANDIDATES


def rebuild(
    model: nn.Module, config: ModiffConfig, layers: Mapping[str, LayerConfig], splits: Mapping[str, int]
) -> Attachment:
    """Replace the named layers of a plain model by packed quantized_layers whose codes and scales lie on the
    meta device.

    Nothing is allocated. The float weights stay in the originals until `seal`.
    Raises: StateError if the model carries modiff already; ConfigError for a split outside the channels, the model then
        unchanged.
    """
    check_plain(model)
    entries: list[Entry] = []
    for name, module in model.named_modules():
        if isinstance(module, CANDIDATES):
            layer = layers.get(name)
            reason = "in full precision in the checkpoint" if layer is None else ""
            entries.append(Entry(name, type(module).__name__, module.weight.numel(), layer, reason))
    attachment = replace_layers(model, config, Report(tuple(entries)), splits)
    for quantized in attachment.layers.values():
        if quantized.config.weight.bits is not None:
            (dtype, shape), (scale_dtype, scale_shape) = quantized.packed_storage()
            quantized.hold_packed(
                torch.empty(shape, dtype=dtype, device="meta"),
                torch.empty(scale_shape, dtype=scale_dtype, device="meta"),
            )
    return attachment


def check_plain(model: nn.Module) -> None:
    """Raise the StateError of a model that a checkpoint cannot be loaded into; nothing happens for any other."""
    if attachment_of(model) is not None:
        raise StateError(
            f"load: expected a plain model, got {type(model).__name__} with modulated layers. The checkpoint brings "
            "its own. Call modiff.remove(model) first, or give a new model."
        )
