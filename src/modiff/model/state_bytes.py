"""How much memory the states of a model hold now."""

from __future__ import annotations

from torch import nn

from modiff.model.attach import required_attachment


def state_bytes(model: nn.Module) -> int:
    """Measured bytes of all states, input and output, of all contexts; a state that layers share counts once.

    The moves that the linear predictor keeps are counted too. 0 between trajectories: the states are freed then.
    Raises: StateError if modiff was not applied to the model.
    """
    quantized_layers = required_attachment(model, "state_bytes").layers.values()
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for w in quantized_layers
        for t in w.state_tensors()
    }
    return sum(storages.values())
