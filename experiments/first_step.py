"""Plain quantization whose first step runs in full precision: the baseline "with warm-up" of the paper's Table 18."""

from __future__ import annotations

from torch import Tensor, nn

from experiments.skipping import exact_code
from modiff.core.quantizer import Code, Quantizer
from modiff.errors import ConfigError
from modiff.model.attach import required_attachment
from modiff.nn import Clock


def full_precision_first_step(model: nn.Module) -> None:
    """Let plain layers pass their input on unrounded at the first step of each trajectory, until `remove`.

    Raises: StateError if modiff was not applied; ConfigError for modulated layers, whose config says how they start.
    """
    quantized_layers = required_attachment(model, "full_precision_first_step").layers
    for name, quantized in quantized_layers.items():
        if quantized.quantizer is None or quantized.config.modulation is not None:
            raise ConfigError(
                f"{name}: expected a plainly quantized layer, got {quantized.config.to_dict()}. Modulated layers have "
                "ModulationConfig(first_step=...). Use presets.plain(...)."
            )
    for quantized in quantized_layers.values():
        if quantized.quantizer is not None:
            quantized.quantizer = _FirstStepCoder(quantized.quantizer, quantized.clock)


class _FirstStepCoder(Quantizer):
    """The layer's quantizer from the second step on."""

    def __init__(self, quantizer: Quantizer, clock: Clock) -> None:
        super().__init__(quantizer.config, quantizer.granularity, quantizer.channel_dim, quantizer.segments)
        self.clock = clock

    def __call__(self, residual: Tensor) -> Code | None:
        """The activation itself at the first step, its codes at all others."""
        # a plain layer needs no trajectory; outside of one there is no first step
        if self.clock.active and self.clock.step == 0:
            return exact_code(residual, self.channel_dim)
        return super().__call__(residual)
