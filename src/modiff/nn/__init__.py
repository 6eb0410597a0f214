"""Which layers? Modulated quantized_layers of the torch layers, which own the states and call the recursion."""

from modiff.nn.clock import Clock
from modiff.nn.conv import ModulatedConv1d, ModulatedConv2d, ModulatedConv3d
from modiff.nn.layer import LayerState, ModulatedLayer
from modiff.nn.linear import ModulatedLinear
from modiff.nn.registry import QUANTIZED_CLASSES, quantized_class

__all__ = [
    "QUANTIZED_CLASSES",
    "Clock",
    "LayerState",
    "ModulatedConv1d",
    "ModulatedConv2d",
    "ModulatedConv3d",
    "ModulatedLayer",
    "ModulatedLinear",
    "quantized_class",
]
