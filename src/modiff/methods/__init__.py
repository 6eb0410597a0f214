"""Whose recipe? One file for each published method, on the skeleton of `recipe` and the registry."""

from modiff.methods.accuquant import AccuquantConfig as AccuquantConfig
from modiff.methods.eda_dm import EdaDmConfig as EdaDmConfig
from modiff.methods.gradient_aligned import GradientAlignedConfig as GradientAlignedConfig
from modiff.methods.modiff import ModiffMethodConfig as ModiffMethodConfig
from modiff.methods.ptq4dm import Ptq4dmConfig as Ptq4dmConfig
from modiff.methods.ptqd import PtqdConfig as PtqdConfig
from modiff.methods.q_diffusion import QDiffusionConfig as QDiffusionConfig
from modiff.methods.qncd import QncdConfig as QncdConfig
from modiff.methods.recipe import MethodConfig as MethodConfig
from modiff.methods.recipe import MethodJob as MethodJob
from modiff.methods.recipe import MethodReport as MethodReport
from modiff.methods.recipe import boundary_overrides as boundary_overrides
from modiff.methods.recipe import every_layer as every_layer
from modiff.methods.registry import METHODS as METHODS
from modiff.methods.registry import method_config as method_config
from modiff.methods.registry import quantize as quantize
from modiff.methods.registry import register as register
from modiff.methods.tac import TacConfig as TacConfig
from modiff.methods.tfmq_dm import TfmqDmConfig as TfmqDmConfig
