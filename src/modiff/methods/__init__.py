"""Whose recipe? One file for each published method, made of the verbs: collect, apply, reconstruct, calibrate."""

from modiff.methods.accuquant import AccuquantConfig, apply_accuquant
from modiff.methods.modiff import ModiffMethodConfig, apply_modiff
from modiff.methods.ptq4dm import Ptq4dmConfig, apply_ptq4dm
from modiff.methods.q_diffusion import QDiffusionConfig, apply_q_diffusion
from modiff.methods.tfmq_dm import TfmqDmConfig, apply_tfmq_dm

__all__ = [
    "AccuquantConfig",
    "ModiffMethodConfig",
    "Ptq4dmConfig",
    "QDiffusionConfig",
    "TfmqDmConfig",
    "apply_accuquant",
    "apply_modiff",
    "apply_ptq4dm",
    "apply_q_diffusion",
    "apply_tfmq_dm",
]
