"""Turn the weights of a model into integers for good, or make room for those of a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from modiff.config import LayerConfig, ModiffConfig
from modiff.errors import StateError
from modiff.model.apply import replace_layers
from modiff.model.attach import Attachment, attachment_of, required_attachment
from modiff.model.report import Entry, Report
from modiff.model.select import CANDIDATES


def pack_layers(model: nn.Module) -> None:
    """Replace the float weights of modulated layers by integer codes and float32 scales.

    Weights of 2 to 4 bits take half a byte, those of 5 to 8 bits one. States start with the quantized weights from now
    on; outputs of layers that did so before stay the same bits. There is no way back: `remove` is refused afterwards.
    Layers whose weights have no bits keep their floats.
    Raises: StateError if modiff was not applied, inside a trajectory, or if weights changed after their rounding was
        learned; ConfigError for a weight with NaN. The model is as it was then.
    Cost: two passes over the weights.
    """
    check_packable(model)
    attachment = required_attachment(model, "pack")
    for layer in attachment.layers.values():
        layer.pack()
    seal(attachment)


def check_packable(model: nn.Module) -> None:
    """Raise what `pack` would raise, before anything is packed."""
    attachment = required_attachment(model, "pack")
    if attachment.clock.active and not (attachment.automatic and attachment.automatic.owns_trajectory):
        raise StateError(
            f"pack: expected no running trajectory of {type(model).__name__}, got one. Its states belong to the "
            "weights as they are. Leave `with modiff.trajectory(model):` first."
        )
    for layer in attachment.layers.values():
        if layer.weight.is_meta:
            raise StateError(
                f"{layer.name}: expected a weight in memory, got one on the meta device. It is offloaded. Remove the "
                "offloading hooks first."
            )
        if layer.config.weight.bits is not None:
            layer.quantized_weight.codes(layer.weight)


def seal(attachment: Attachment) -> None:
    """Drop the original layers: the model is packed."""
    attachment.originals.clear()
    attachment.packed = True


def rebuild(
    model: nn.Module, config: ModiffConfig, layers: Mapping[str, LayerConfig], splits: Mapping[str, int]
) -> Attachment:
    """Replace the named layers of a plain model by packed ones whose codes and scales lie on the meta device.

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
    for layer in attachment.layers.values():
        if layer.config.weight.bits is not None:
            weight, scale = (torch.empty(shape, dtype=dtype, device="meta") for dtype, shape in layer.packed_storage())
            layer.hold_packed(weight, scale)
    return attachment


def check_plain(model: nn.Module) -> None:
    """Raise the StateError of a model that a checkpoint cannot be loaded into; nothing happens for any other."""
    if attachment_of(model) is not None:
        raise StateError(
            f"load: expected a plain model, got {type(model).__name__} with modulated layers. The checkpoint brings "
            "its own. Call modiff.remove(model) first, or give a new model."
        )
