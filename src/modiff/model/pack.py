"""Turn the weights of a model into integers for good."""

from __future__ import annotations

from torch import nn

from modiff.errors import StateError
from modiff.model.attach import Attachment, required_attachment


def pack_layers(model: nn.Module) -> None:
    """Keep integer codes and float32 scales in the place of the float weights of modulated layers.

    Weights of 2 to 4 bits take half a byte, those of 5 to 8 bits one. States start with the quantized weights from now
    on; outputs of layers that did so before stay the same bits. There is no way back: `remove` is refused afterwards.
    Layers whose weights have no bits keep their floats.
    Raises: StateError if modiff was not applied, inside a trajectory, or if weights changed after their rounding was
        learned; ConfigError for a weight with NaN. The model is as it was then.
    Cost: two passes over the weights.
    """
    check_packable(model)
    attachment = required_attachment(model, "pack")
    for quantized in attachment.layers.values():
        quantized.pack()
    seal(attachment)


def check_packable(model: nn.Module) -> None:
    """Raise what `pack` would raise, before anything is packed."""
    attachment = required_attachment(model, "pack")
    if attachment.clock.active and not (attachment.automatic and attachment.automatic.mine):
        raise StateError(
            f"pack: expected no running trajectory of {type(model).__name__}, got one. Its states belong to the "
            "weights as they are. Leave `with modiff.trajectory(model):` first."
        )
    for quantized in attachment.layers.values():
        if quantized.weight.is_meta:
            raise StateError(f"{quantized.name}: expected a weight in memory, got one on the meta device. It is "
                         "offloaded. "
                             "Remove the offloading hooks first.")  # fmt: skip
        if quantized.config.weight.bits is not None:
            quantized.quantized_weight.codes(quantized.weight)


def seal(attachment: Attachment) -> None:
    """Forget the layers that the quantized_layers were made from."""
    attachment.originals.clear()
    attachment.packed = True
