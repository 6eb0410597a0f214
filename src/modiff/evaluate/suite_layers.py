"""Where a configuration's error arises: each layer's own recursion beside a full-precision trajectory."""

from __future__ import annotations

from collections.abc import Sequence

from diffusers import DiffusionPipeline

from modiff.evaluate.layer_errors import LayerErrors, LayerTrace
from modiff.evaluate.suite_plans import Plan
from modiff.evaluate.watch import watch
from modiff.hosts.noise import noise_generators


def watched_plan(plans: Sequence[Plan]) -> Plan | None:
    """The configuration whose layers are shown: the last modulated one with dynamic scales, else the last such one.

    None if there is none: static scales are measured on a modulated model, and layers are watched on the plain one.
    """
    dynamic = [p for p in plans if p.config is not None and all(
        layer.activation.dynamic for layer in (p.config.layer, *(c for _, c in p.config.overrides))
    )]  # fmt: skip
    modulated = [p for p in dynamic if p.config is not None and p.config.layer.modulation is not None]
    return (modulated or dynamic or [None])[-1]


def layer_errors(pipe: DiffusionPipeline, plan: Plan, *, num_images: int = 4, seed: int = 0) -> list[LayerTrace]:
    """The errors of every layer at every step, layers fed with their full-precision inputs.

    Args:
        pipe: unconditional, without modiff, with the sampler in question. plan: one with a config.
    Cost: one trajectory of `num_images`, with each layer's recursion beside it.
    """
    if plan.config is None:
        return []
    errors = LayerErrors()

    def run() -> object:
        noise = noise_generators(seed, range(num_images))
        return pipe(batch_size=num_images, num_inference_steps=plan.steps, generator=noise, output_type="np")

    watch(pipe, run, plan.config, [errors])
    return errors.layers()
