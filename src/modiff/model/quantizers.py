"""Every activation quantizer of a model, by name."""

from __future__ import annotations

from torch import nn

from modiff.core.quantizer import Quantizer
from modiff.model.attach import required_attachment
from modiff.model.attention import attention_coders


def quantizers_of(model: nn.Module) -> dict[str, Quantizer]:
    """The quantizer of each layer under the layer's name, those of attention under "<module>.q", .k, .v and .softmax.

    A quantizer that layers share is under each of their names; layers without one are left out. What
    `calibrate` measures,
    and what a checkpoint saves (`Quantizer.state_dict_tensors`). Raises: StateError if modiff was not applied
    to the model.
    """
    quantized_layers = required_attachment(model, "quantizers_of").layers
    found = {
        name: quantized.quantizer for name, quantized in quantized_layers.items() if quantized.quantizer is not None
    }
    return found | attention_coders(model)
