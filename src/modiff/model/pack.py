"""Turn the weights of a model into integers for good, or make room for those of a checkpoint."""

from collections.abc import Collection, Mapping

import torch
from torch import nn

from modiff.config import LayerConfig, ModiffConfig, PackedAnchors, check
from modiff.errors import ConfigError, StateError
from modiff.model.apply import replace_layers
from modiff.model.attach import Attachment, required_attachment
from modiff.model.report import Entry, Report
from modiff.model.select import CANDIDATES
from modiff.nn.adapters import fused_adapter
from modiff.nn.weight import packed_storage


def pack_layers(model: nn.Module, anchor_weights: PackedAnchors = "quantized") -> None:
    """Replace the float weights of modulated layers by integer codes and float32 scales, as `modiff.pack` says."""
    check_packable(model, anchor_weights)
    for layer in required_attachment(model, "pack").layers.values():
        layer.pack(anchor_weights)
    seal(required_attachment(model, "pack"))


def check_packable(model: nn.Module, anchor_weights: PackedAnchors = "quantized") -> None:
    """Make sure that a model can be packed, before anything is. Raises: StateError or ConfigError, as `modiff.pack`."""
    attachment = required_attachment(model, "pack")
    check_anchors(model, "pack", anchor_weights)
    if attachment.in_trajectory:
        raise StateError(
            f"pack: expected no running trajectory of {type(model).__name__}, got one. Its states belong to the "
            "weights as they are. Leave `with modiff.trajectory(model):` first."
        )
    if (name := fused_adapter(model)) is not None:
        raise StateError(
            f"pack: expected no fused adapters, got one in {name}. Unfused later, it would be taken from integers. "
            "Call pipe.unload_lora_weights(), which keeps what is fused, or pipe.unfuse_lora()."
        )
    for layer in attachment.layers.values():
        layer.check_own("pack")
        if layer.weight.is_meta:
            raise StateError(
                f"{layer.name}: expected a weight in memory, got one on the meta device. It is offloaded. Remove the "
                "offloading hooks first."
            )
        if layer.config.weight.bits is not None:
            layer.quantized_weight.codes(layer.weight)


def check_anchors(model: nn.Module, verb: str, anchor_weights: PackedAnchors) -> None:
    """Make sure that `anchor_weights` can be kept of a model. Raises: as `check_packable`."""
    check(f"{verb}.anchor_weights", anchor_weights, anchor_weights in ("quantized", "int8"), "'quantized' or 'int8'",
          "It says what is kept of a weight for anchors.")  # fmt: skip
    if anchor_weights == "quantized":
        return
    exact = [layer for layer in required_attachment(model, verb).layers.values() if layer.spec.anchors_exactly]
    if not exact:
        raise ConfigError(
            f"{verb}.anchor_weights: expected 'quantized' for {type(model).__name__}, got 'int8'. None of its layers "
            "anchors with exact weights, so nothing would read the codes. Leave it out."
        )
    for gone in (layer for layer in exact if layer.packed and not layer.keeps_error()):
        raise StateError(
            f"{gone.name}: expected a float weight, got a packed one without anchor codes. They are made from the "
            f"floats, which are gone. Give anchor_weights='int8' when the model is packed, or leave it out here."
        )


def seal(attachment: Attachment) -> None:
    """Drop the original layers: the model is packed."""
    attachment.originals.clear()
    attachment.packed = True


def rebuild(
    model: nn.Module,
    config: ModiffConfig,
    layers: Mapping[str, LayerConfig],
    splits: Mapping[str, int],
    anchored: Collection[str],
) -> Attachment:
    """Replace the named layers of a plain model by packed ones whose codes and scales lie on the meta device.

    anchored: layers that have codes of their weight's rounding error too.
    Raises: ConfigError for a split outside the channels, the model then unchanged.
    """
    entries: list[Entry] = []
    for name, module in model.named_modules():
        if isinstance(module, CANDIDATES):
            reason = "" if name in layers else "in full precision in the checkpoint"
            entries.append(Entry(name, type(module).__name__, module.weight.numel(), layers.get(name), reason))
    attachment = replace_layers(model, config, Report(tuple(entries)), splits)
    for name, layer in attachment.layers.items():
        bits, ranges = layer.config.weight.bits, len(layer.quantized_weight.columns)
        if bits is not None:
            stored = packed_storage(bits, layer.weight_shape, ranges, error=name in anchored)
            layer.hold_packed({k: torch.empty(shape, dtype=d, device="meta") for k, (d, shape) in stored.items()})
    return attachment
