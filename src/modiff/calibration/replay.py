"""Run a network on calls that were kept of its trajectories."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import nn
from tqdm import tqdm

from modiff.calibration.data import Call, calls_with_previous
from modiff.errors import CalibrationError
from modiff.model.attach import attachment_of
from modiff.model.trajectory import model_trajectory


def replay(model: nn.Module, calls: Sequence[Call], *, progress: bool = False) -> None:
    """Evaluate the network on each call, for `modiff.calibrate(model, lambda: replay(model, calls))`.

    Modulated layers see each call as the second step of a trajectory whose first step is the call before it: what they
    code is the residual of the two (MoDiff). Calls of a first step have no residual and are left out.

    Raises: CalibrationError if modulated layers are to be run and no call holds the one before it.
    Cost: one evaluation a call, two with modulated layers.
    """
    attachment = attachment_of(model)
    modulated = attachment is not None and any(quantized.inputs is not None for quantized in attachment.layers.values())
    if modulated:
        calls = calls_with_previous("replay", calls)
    elif not len(calls):
        raise CalibrationError("replay: expected calls, got none. There is nothing to run. Collect a trajectory.")
    with torch.no_grad(), model_trajectory(model) if attachment is not None and not modulated else nullcontext():
        for call in tqdm(calls, desc="replay", unit="call", disable=not progress):
            with model_trajectory(model) if modulated else nullcontext():
                if modulated and call.previous is not None:
                    call.previous.evaluate(model)
                call.evaluate(model)
