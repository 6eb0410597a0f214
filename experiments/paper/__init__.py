"""The experiments of the paper, one module each, by name and in the order of a report."""

from collections.abc import Sequence
from importlib import import_module

from experiments.experiment import Experiment
from modiff.errors import ConfigError

MODULES = ("figure1a", "figure1b", "table2", "table4", "samplers", "table18", "table6", "growth", "clip", "granularity",
           "state_dtype", "table17", "zero_bits")  # fmt: skip
EXPERIMENTS: dict[str, Experiment] = {
    module.EXPERIMENT.name: module.EXPERIMENT
    for module in (import_module(f"experiments.paper.{name}") for name in MODULES)
}


def experiment_names(names: Sequence[str]) -> tuple[str, ...]:
    """Those of `names` that are experiments, in order; "all" is every one, and table15 is known too.

    Raises: ConfigError for an unknown name.

    >>> experiment_names(["table4", "figure1a", "table15"])
    ('figure1a', 'table4', 'samplers')
    """
    known = {alias: (e.name,) for e in EXPERIMENTS.values() for alias in (e.name, *e.also)}
    known["all"] = tuple(EXPERIMENTS)
    if unknown := [name for name in names if name not in known]:
        raise ConfigError(
            f"experiments: expected all, or names among {', '.join(EXPERIMENTS)}, got {', '.join(unknown)}. "
            "Use for example: python -m experiments figure1a table4."
        )
    chosen = {name for alias in names for name in known[alias]}
    return tuple(name for name in EXPERIMENTS if name in chosen)
