"""Configs of the experiments: a preset with a few fields changed."""

from __future__ import annotations

from dataclasses import replace

from modiff.config import ModiffConfig, ModulationConfig, StateDtype

PAPER = ModulationConfig(anchor_weights="quantized", stagger=False)
"""The loop as published; the experiments change single fields of it."""


def quantized_with(
    config: ModiffConfig, *, clip: float | None = None, granularity: str | None = None, bits: int | None = None
) -> ModiffConfig:
    """The config with another quantizer of activations; None keeps what it has."""
    old = config.layer.activation
    activation = replace(
        old,
        clip=old.clip if clip is None else clip,
        granularity=granularity or old.granularity,
        bits=old.bits if bits is None else bits,
    )
    return replace(config, layer=replace(config.layer, activation=activation))


def looped(config: ModiffConfig, modulation: ModulationConfig) -> ModiffConfig:
    """The config with another loop."""
    return replace(config, layer=replace(config.layer, modulation=modulation))


def in_dtype(config: ModiffConfig, dtype: StateDtype) -> ModiffConfig:
    """The config with its states in another dtype."""
    return looped(config, replace(config.layer.modulation or PAPER, state_dtype=dtype))
