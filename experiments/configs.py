"""Configs of the experiments: a preset with a few fields changed."""

from __future__ import annotations

import dataclasses

from modiff.config import (
    ErrorCompensation,
    FirstStep,
    Granularity,
    ModiffConfig,
    ModulationConfig,
    StateDtype,
)


def coded(
    config: ModiffConfig, *, clip: float | None = None, granularity: Granularity | None = None, bits: int | None = None
) -> ModiffConfig:
    """The config with another quantizer; None keeps what it has."""
    layer = config.layer
    activation = dataclasses.replace(
        layer.activation,
        clip=layer.activation.clip if clip is None else clip,
        granularity=granularity or layer.activation.granularity,
        bits=layer.activation.bits if bits is None else bits,
    )
    return dataclasses.replace(config, layer=dataclasses.replace(layer, activation=activation))


def looped(
    config: ModiffConfig,
    *,
    predictor: str = "hold",
    gain: float = 1.0,
    first_step: FirstStep = "full_precision",
    rounds: int = 1,
    error_compensation: ErrorCompensation = "closed_loop",
    reanchor_every: int = 0,
    state_dtype: StateDtype = "float32",
) -> ModiffConfig:
    """The config with another closed loop."""
    modulation = ModulationConfig(
        predictor=predictor,
        gain=gain,
        first_step=first_step,
        rounds=rounds,
        error_compensation=error_compensation,
        anchor_weights="quantized",
        reanchor_every=reanchor_every,
        stagger=False,
        state_dtype=state_dtype,
    )
    return dataclasses.replace(config, layer=dataclasses.replace(config.layer, modulation=modulation))


def in_dtype(config: ModiffConfig, dtype: StateDtype) -> ModiffConfig:
    """The config with its states in another dtype."""
    modulation = dataclasses.replace(config.layer.modulation or ModulationConfig(), state_dtype=dtype)
    return dataclasses.replace(config, layer=dataclasses.replace(config.layer, modulation=modulation))
