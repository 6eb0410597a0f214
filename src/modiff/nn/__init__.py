"""Which layers? Modulated twins of the torch layers, which own the states and call the recursion."""

from modiff.nn.clock import Clock
from modiff.nn.conv import ModulatedConv1d, ModulatedConv2d, ModulatedConv3d
from modiff.nn.layer import LayerState, ModulatedLayer
from modiff.nn.linear import ModulatedLinear
from modiff.nn.registry import TWINS, twin_of

__all__ = [
    "TWINS",
    "Clock",
    "LayerState",
    "ModulatedConv1d",
    "ModulatedConv2d",
    "ModulatedConv3d",
    "ModulatedLayer",
    "ModulatedLinear",
    "twin_of",
]
