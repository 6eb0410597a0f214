"""Can the steps of a model be recorded once and repeated without Python, as CUDA graphs are?"""

from torch import nn

from modiff.model.attach import required_attachment
from modiff.nn import ModulatedLayer

STEPS_BEFORE = 3
"""Evaluations of each context before one that may be recorded: the states start, moves appear, step sizes are known."""


def recording_unsupported(model: nn.Module) -> str:
    """Why a step must not be recorded and repeated; empty if it may be, after STEPS_BEFORE evaluations of a trajectory.

    A recorded step repeats its operators on the same memory. So states must change in place, which those on integers
    do, nothing may wait for the device, and no count kept in Python may decide what runs. The states of later
    trajectories must lie where they lay when the step was recorded: bench/loop/graphs.py moves them there.
    Raises: StateError if modiff was not applied to the model.
    """
    quantized_layers = required_attachment(model, "recording_unsupported").layers
    for name, quantized in quantized_layers.items():
        if unsupported := _unsupported(quantized):
            return f"{name}: {unsupported}"
    return ""


def _unsupported(layer: ModulatedLayer) -> str:
    quantizer, modulation = layer.quantizer, layer.config.modulation
    if quantizer is None:
        return ""
    if quantizer.watching:
        return "its scales are being measured"
    if not quantizer.config.dynamic and quantizer.config.step_groups != 1:
        return "its scales are chosen by the time step, on the host"
    if modulation is None:
        return ""
    if not quantizer.config.dynamic:
        return "its static scales are compared with the size of each step, on the host"
    if not layer.on_integers:
        return "it is simulated, and its states move to new tensors at every step"
    if layer.loop.state_dtype == "int16":
        return "int16 states ask at every step whether they outgrew 16 bits"
    if quantizer.config.refresh_every != 1:
        return f"its scales are measured at every {quantizer.config.refresh_every}th step"
    if modulation.reanchor_every:
        return f"its states start again at every {modulation.reanchor_every}th step"
    return ""
