"""Where a configuration's error arises: each layer's own recursion beside a full-precision trajectory."""

from __future__ import annotations

from collections.abc import Sequence

from modiff.evaluate.layer_errors import LayerErrors, LayerTrace
from modiff.evaluate.suite_images import PipelineSource
from modiff.evaluate.suite_plans import Plan
from modiff.evaluate.watch import watch


def watched_plan(plans: Sequence[Plan]) -> Plan | None:
    """The configuration whose layers are shown: the last modulated one with dynamic scales, else the last such one.

    None if there is none: static scales are measured on a modulated model, and layers are watched on the plain one.
    """
    dynamic = [p for p in plans if p.config is not None and all(
        layer.activation.dynamic for layer in (p.config.layer, *(c for _, c in p.config.overrides))
    )]  # fmt: skip
    modulated = [p for p in dynamic if p.config is not None and p.config.layer.modulation is not None]
    return (modulated or dynamic or [None])[-1]


def layer_errors(source: PipelineSource, plan: Plan, *, num_images: int = 4) -> list[LayerTrace]:
    """The errors of every layer at every step, layers fed with their full-precision inputs.

    Args:
        source: its pipeline must be without modiff. plan: one with a config.
    Cost: one trajectory of `num_images`, with each layer's recursion beside it.
    """
    if plan.config is None:
        return []
    errors = LayerErrors()
    watch(source.pipe, lambda: source.run(plan.steps, range(num_images)), plan.config, [errors])
    return errors.layers()
