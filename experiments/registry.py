"""All experiments by name."""

from __future__ import annotations

from experiments.experiment import Experiment
from experiments.paper import (
    clip,
    figure1a,
    figure1b,
    granularity,
    growth,
    samplers,
    state_dtype,
    table2,
    table4,
    table6,
    table17,
    table18,
    zero_bits,
)
from modiff.errors import ConfigError

EXPERIMENTS: dict[str, Experiment] = {
    module.EXPERIMENT.name: module.EXPERIMENT
    for module in (
        figure1a,
        figure1b,
        table2,
        table4,
        samplers,
        table18,
        table6,
        growth,
        clip,
        granularity,
        state_dtype,
        table17,
        zero_bits,
    )
}
"""In the order of a report."""


def experiment_names(text: str = "all") -> tuple[str, ...]:
    """The experiments that `text` names: "all", or names between commas; other names, such as table15, are known too.

    Raises: ConfigError for a name that is none.

    >>> experiment_names("table4, figure1a, table15")
    ('figure1a', 'table4', 'samplers')
    """
    if text.strip() in ("", "all"):
        return tuple(EXPERIMENTS)
    known = {other: e.name for e in EXPERIMENTS.values() for other in (e.name, *e.also)}
    asked = [part.strip() for part in text.split(",") if part.strip()]
    unknown = [name for name in asked if name not in known]
    if unknown or not asked:
        got = ", ".join(unknown) or repr(text)
        raise ConfigError(
            f"experiments: expected all, or names among {', '.join(EXPERIMENTS)}, got {got}. "
            "Use for example: python -m experiments figure1a table4."
        )
    wanted = {known[name] for name in asked}
    return tuple(name for name in EXPERIMENTS if name in wanted)
