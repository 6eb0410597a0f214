"""Private names of torch and diffusers that modiff uses, so that a version without one of them is told by its name.

Neither library promises to keep them. torch's are looked up with the first target, diffusers' with its first object.
"""

import functools
import importlib
from operator import attrgetter

from modiff.errors import KernelError

TORCH = (
    "torch.nn.modules.conv:Conv1d._conv_forward",
    "torch.nn.modules.conv:Conv2d._conv_forward",
    "torch.nn.modules.conv:Conv3d._conv_forward",
    "torch.nn.modules.module:Module._call_impl",
    "torch._subclasses.fake_tensor:FakeTensorMode",
    "torch.nn.modules.module:Module._compiled_call_impl",
    "torch:Tensor._version",
    "torch:UntypedStorage._cdata",
    "torch:_ops.OpOverload",
    "torch:_ops.OpOverloadPacket",
    "torch:_ops.HigherOrderOperator",
)
DIFFUSERS = (
    "diffusers.quantizers.auto:AUTO_QUANTIZER_MAPPING",
    "diffusers.quantizers.auto:AUTO_QUANTIZATION_CONFIG_MAPPING",
    "diffusers.quantizers.base:DiffusersQuantizer._process_model_before_weight_loading",
    "diffusers.quantizers.base:DiffusersQuantizer._process_model_after_weight_loading",
    "diffusers.configuration_utils:FrozenDict",
    "diffusers.configuration_utils:ConfigMixin.register_to_config",  # which sets _internal_dict
    "diffusers.models.cache_utils:CacheMixin._reset_stateful_cache",
    "diffusers:DDPMScheduler._get_variance",
)
COMPILER = ("torch._dynamo:lookup_backend", "torch._dynamo.eval_frame:OptimizedModule")
"""Loading these takes seconds, so torch.compile asks for them itself."""


@functools.cache
def check_private_names(names: tuple[str, ...]) -> None:
    """Raises: KernelError that names the first one that is missing, and the version of its library."""
    for name in names:
        module, _, path = name.partition(":")
        package = importlib.import_module(module.partition(".")[0])
        try:
            attrgetter(path)(importlib.import_module(module))
        except (ImportError, AttributeError) as error:
            raise KernelError(
                f"{package.__name__} {package.__version__}: expected {module}.{path}, which modiff uses, got none. It "
                "is private there and has changed. Install the version that modiff's pyproject.toml names."
            ) from error
