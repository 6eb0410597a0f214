"""Plain quantization whose first step runs in full precision: the baseline "with warm-up" of the paper's Table 18."""

from __future__ import annotations

from torch import Tensor, nn

from modiff.core.coder import Code, Coder
from modiff.errors import ConfigError
from modiff.evaluate.study.skipping import exact_code
from modiff.model.attachment import required_attachment
from modiff.nn import Clock


def full_precision_first_step(model: nn.Module) -> None:
    """Let plain layers pass their input on unrounded at the first step of each trajectory, until `remove`.

    Raises: StateError if modiff was not applied; ConfigError for modulated layers, whose config says how they start.
    """
    twins = required_attachment(model, "full_precision_first_step").twins
    for name, twin in twins.items():
        if twin.coder is None or twin.config.modulation is not None:
            raise ConfigError(
                f"{name}: expected a plainly quantized layer, got {twin.config.to_dict()}. Modulated layers have "
                "ModulationConfig(first_step=...). Use presets.plain(...)."
            )
    for twin in twins.values():
        if twin.coder is not None:
            twin.coder = _FirstStepCoder(twin.coder, twin.clock)


class _FirstStepCoder(Coder):
    """The layer's coder from the second step on."""

    def __init__(self, coder: Coder, clock: Clock) -> None:
        super().__init__(coder.config, coder.granularity, coder.channel_dim, coder.segments)
        self.clock = clock

    def __call__(self, residual: Tensor) -> Code | None:
        """The activation itself at the first step, its codes at all others."""
        # a plain layer needs no trajectory; outside of one there is no first step
        if self.clock.active and self.clock.step == 0:
            return exact_code(residual, self.channel_dim)
        return super().__call__(residual)
