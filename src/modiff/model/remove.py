"""Undo `apply`."""

from __future__ import annotations

from torch import nn

from modiff.errors import StateError
from modiff.model.attach import ATTRIBUTE, required_attachment
from modiff.model.attention import remove_attention


def uninstall(model: nn.Module) -> None:
    """Put the original layers back: the same modules, the same parameters, the same bits.

    Raises: StateError if modiff was not applied to the model, its weights were packed, or another library wrapped the
        quantized_layers since; the model is as it was then.
    """
    attachment = required_attachment(model, "remove")
    check_removable(model)
    remove_attention(model)
    for handle in attachment.handles:
        handle.remove()
    attachment.clock.stop()
    for name, original in attachment.originals.items():
        parent, _, leaf = name.rpartition(".")
        original.train(attachment.layers[name].training)
        setattr(model.get_submodule(parent), leaf, original)
    del model.__dict__[ATTRIBUTE]


def check_removable(model: nn.Module) -> None:
    """Raise the StateError of a model whose originals cannot come back; nothing happens for any other."""
    attachment = required_attachment(model, "remove")
    if attachment.packed:
        raise StateError(
            f"remove: expected float weights to put back, got {type(model).__name__} with packed ones. Packing keeps "
            "the integers alone. Load the full-precision model again."
        )
    modules = dict(model.named_modules())
    for name, quantized in attachment.layers.items():
        if modules.get(name) is not quantized or "forward" in quantized.__dict__:
            raise StateError(
                f"remove: expected {name} as modiff left it, got it wrapped by another library. Putting the original "
                "back would drop a LoRA or an offloading hook. Undo that first (unload_lora_weights, remove_all_hooks)."
            )
