"""Whose recipe? One file for each published method, on the skeleton of `recipe` and the registry."""

from modiff.methods.accuquant import AccuquantConfig
from modiff.methods.modiff import ModiffMethodConfig
from modiff.methods.ptq4dm import Ptq4dmConfig
from modiff.methods.q_diffusion import QDiffusionConfig
from modiff.methods.recipe import MethodConfig, MethodJob, MethodReport, boundary_overrides, every_layer
from modiff.methods.registry import METHODS, method_config, quantize, register
from modiff.methods.tfmq_dm import TfmqDmConfig

__all__ = [
    "METHODS",
    "AccuquantConfig",
    "MethodConfig",
    "MethodJob",
    "MethodReport",
    "ModiffMethodConfig",
    "Ptq4dmConfig",
    "QDiffusionConfig",
    "TfmqDmConfig",
    "boundary_overrides",
    "every_layer",
    "method_config",
    "quantize",
    "register",
]
