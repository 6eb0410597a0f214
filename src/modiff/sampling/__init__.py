"""How is it sampled? Trajectories next to each other, and samplers that know of quantization.

Folders of diffusers name this module as the home of modiff's schedulers, which load when they are first asked for.
"""

import importlib as _importlib
from typing import Any as _Any

_HOMES = dict.fromkeys(
    (
        "CorrectedCogVideoXDDIMScheduler",
        "CorrectedDDIMScheduler",
        "CorrectedDDPMScheduler",
        "CorrectedDPMSolverMultistepScheduler",
        "CorrectedDPMSolverSinglestepScheduler",
        "CorrectedFlowMatchEulerDiscreteScheduler",
        "SchedulerMixin",  # by which diffusers tells how to load them
    ),
    "modiff.sampling.corrected",
)


def __getattr__(name: str) -> _Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(_importlib.import_module(_HOMES[name]), name)
