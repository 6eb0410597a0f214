"""Every activation quantizer of a model, by name."""

from __future__ import annotations

from torch import nn

from modiff.core.coder import Coder
from modiff.model.attachment import required_attachment
from modiff.model.attention import attention_coders


def coders_of(model: nn.Module) -> dict[str, Coder]:
    """The coder of each layer under the layer's name, those of attention under "<module>.q", .k, .v and .softmax.

    A coder that layers share is under each of their names; layers without one are left out. What `calibrate` measures,
    and what a checkpoint saves (`Coder.state_dict_tensors`). Raises: StateError if modiff was not applied to the model.
    """
    twins = required_attachment(model, "coders_of").twins
    found = {name: twin.coder for name, twin in twins.items() if twin.coder is not None}
    return found | attention_coders(model)
