"""What states of 16 and of 32 bits lose over 200 steps."""

import pytest
import torch

from modiff import ModulationConfig, QuantizerConfig
from modiff.core.quantizer import Quantizer
from tests.core.loop import Affine, modulate
from tests.helpers import drifting

# An input that stands still is the worst case: what a 16-bit â cannot hold is sent again at every step, ô takes it
# each time, and the roundings add up in one direction instead of partly cancelling.
STEPS = 200
UNIT = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24}
WIDTH = 64
MIXER = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64) / WIDTH**0.5


def drift(state_dtype: str, change: float) -> tuple[float, float]:
    """Root mean square of ô - A(â) after 200 steps, and what one step's roundings of both states leave behind at most.

    Storing x rounds it by at most u |x|. The rounding of â never reaches ô, so a step leaves the layer's image of it
    and ô's own rounding: u sqrt(|W|_F^2 / rows * rms(â)^2 + rms(ô)^2), all relative to rms(ô).
    """
    inputs = drifting(2, (8, WIDTH), STEPS, change, torch.float32)
    operator = Affine(MIXER, torch.zeros(WIDTH, dtype=torch.float64))
    modulation = ModulationConfig(state_dtype=state_dtype)  # type: ignore[arg-type]
    quantizer = Quantizer(QuantizerConfig(bits=4), "sample", -1, (WIDTH,))
    last = modulate(inputs, quantizer.config, modulation, operator=operator, quantizer=quantizer)[-1]
    a, o = last.input.value.double(), last.output.value.double()
    assert last.input.value.dtype == last.output.value.dtype == getattr(torch, state_dtype)
    size = float(o.square().mean().sqrt())
    gain = float(MIXER.square().sum() / WIDTH)
    each = UNIT[state_dtype] * (gain * float(a.square().mean()) + size**2) ** 0.5
    return float((o - a @ MIXER.T).square().mean().sqrt()) / size, each / size


@pytest.mark.parametrize("state_dtype", UNIT)
def test_states_of_moving_inputs_drift_as_a_random_walk_of_their_roundings_and_of_still_ones_in_one_direction(
    state_dtype,
):
    """A rounding is uniform in +-u |x|, of root mean square u |x| / sqrt(3); T independent ones add up to sqrt(T).

    With float32 states the arithmetic rounds as coarsely as the storing, hence twice the bound.
    """
    measured, each = drift(state_dtype, 0.1)
    walk = (STEPS / 3) ** 0.5 * each
    assert walk / 5 < measured < (2.0 if state_dtype == "float32" else 1.0) * walk
    if state_dtype != "float32":
        measured, each = drift(state_dtype, 0.0)
        assert 2 * (STEPS / 3) ** 0.5 * each < measured < STEPS * each
