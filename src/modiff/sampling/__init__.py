"""How is it sampled? Trajectories next to each other, and samplers that know of quantization.

Folders of diffusers name this module as the home of modiff's schedulers, which load when they are first asked for.
"""

import functools as _functools
import importlib as _importlib
import importlib.machinery as _machinery
import sys as _sys
from typing import Any as _Any

ENTRY = "correction"
"""The entry of a scheduler_config.json."""

_HOMES = dict.fromkeys(
    (
        "CorrectedCogVideoXDDIMScheduler",
        "CorrectedDDIMScheduler",
        "CorrectedDDPMScheduler",
        "CorrectedDPMSolverMultistepScheduler",
        "CorrectedDPMSolverSinglestepScheduler",
        "CorrectedFlowMatchEulerDiscreteScheduler",
    ),
    "modiff.sampling.corrected",
) | {"SchedulerMixin": "diffusers"}  # by which diffusers tells how to load them


def __getattr__(name: str) -> _Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(_importlib.import_module(_HOMES[name]), name)


def _keep_corrections(home: _Any) -> None:
    """Let `from_config` of any scheduler keep a correction that its config holds, or refuse it.

    DDIMPipeline makes a DDIMScheduler of the config of whatever it is given, and so do users who load a scheduler or
    change it: diffusers would drop the table with a remark in the log.
    """
    from diffusers.configuration_utils import ConfigMixin

    @_functools.wraps(ConfigMixin.from_config.__func__)
    def from_config(cls: _Any, config: _Any = None, return_unused_kwargs: bool = False, **settings: _Any) -> _Any:
        if settings.get(ENTRY, config.get(ENTRY) if isinstance(config, dict) else None) is not None:
            cls = _importlib.import_module("modiff.sampling.corrected").corrected_kind(cls)
        return super(home.SchedulerMixin, cls).from_config(config, return_unused_kwargs, **settings)

    home.SchedulerMixin.from_config = classmethod(from_config)


class _Finder:
    """Finds diffusers' module of all schedulers, which is changed when it is loaded: `import modiff` loads nothing."""

    module = "diffusers.schedulers.scheduling_utils"

    def find_spec(self, name: str, path: _Any = None, target: _Any = None) -> _Any:
        """None for every other module."""
        spec = _machinery.PathFinder.find_spec(name, path) if name == self.module else None
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def exec_module(module: _Any) -> None:
                load(module)
                _keep_corrections(module)

            spec.loader.exec_module = exec_module
        return spec


if _Finder.module in _sys.modules:
    _keep_corrections(_sys.modules[_Finder.module])
else:
    _sys.meta_path.insert(0, _Finder())
