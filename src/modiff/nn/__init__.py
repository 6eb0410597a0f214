"""Which layers? Quantized classes of the torch layers; each has one loop object with its states."""

from modiff.nn.clock import Clock
from modiff.nn.layer import (
    QUANTIZED_CLASSES,
    ModulatedConv1d,
    ModulatedConv2d,
    ModulatedConv3d,
    ModulatedLayer,
    ModulatedLinear,
    quantized_class,
)

__all__ = [
    "QUANTIZED_CLASSES",
    "Clock",
    "ModulatedConv1d",
    "ModulatedConv2d",
    "ModulatedConv3d",
    "ModulatedLayer",
    "ModulatedLinear",
    "quantized_class",
]
