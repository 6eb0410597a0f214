"""Which torch layers have a modulated quantized."""

from __future__ import annotations

from torch import nn

from modiff.nn.conv import ModulatedConv1d, ModulatedConv2d, ModulatedConv3d
from modiff.nn.layer import ModulatedLayer
from modiff.nn.linear import ModulatedLinear

QUANTIZED_CLASSES: dict[type[nn.Module], type[ModulatedLayer]] = {
    nn.Linear: ModulatedLinear,
    nn.Conv1d: ModulatedConv1d,
    nn.Conv2d: ModulatedConv2d,
    nn.Conv3d: ModulatedConv3d,
}


def quantized_class(layer: nn.Module) -> type[ModulatedLayer] | None:
    """The modulated class for a layer; subclasses count when they keep the torch layer's own forward."""
    for kind, quantized in QUANTIZED_CLASSES.items():
        if isinstance(layer, kind) and type(layer).forward is kind.forward:
            return quantized
    return None
