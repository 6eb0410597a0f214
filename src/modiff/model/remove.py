"""Undo `apply`."""

from __future__ import annotations

from torch import nn

from modiff.model.attachment import ATTRIBUTE, required_attachment


def remove(model: nn.Module) -> None:
    """Put the original layers back: the same modules, the same parameters, the same bits.

    Raises: StateError if modiff was not applied to the model.
    """
    attachment = required_attachment(model, "remove")
    for handle in attachment.handles:
        handle.remove()
    attachment.clock.stop()
    for name, original in attachment.originals.items():
        parent, _, leaf = name.rpartition(".")
        original.train(attachment.twins[name].training)
        setattr(model.get_submodule(parent), leaf, original)
    del model.__dict__[ATTRIBUTE]
