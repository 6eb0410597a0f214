"""Checkpoints that the first edition saved load, and compute what they computed then."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import modiff
from tests.golden.first_edition import FOLDER, module, network, sampled

WANTED = load_file(FOLDER / "outputs.safetensors")


@pytest.mark.parametrize("name", ["unet", "dit"])
def test_a_network_saved_by_the_first_edition_samples_what_it_did(name: str) -> None:
    _, x, evaluate = network(name)
    loaded = modiff.load(FOLDER / name)

    def evaluate_loaded(value: torch.Tensor, step: int) -> torch.Tensor:
        cells = evaluate.__closure__ or ()
        cell = next(c for c in cells if isinstance(c.cell_contents, nn.Module))
        cell.cell_contents = loaded
        return evaluate(value, step)

    torch.testing.assert_close(sampled(loaded, x, evaluate_loaded), WANTED[name], rtol=1e-4, atol=1e-5)


def test_a_module_with_static_scales_saved_by_the_first_edition_samples_what_it_did() -> None:
    model, x = module()
    loaded = modiff.load(FOLDER / "module", into=model)
    torch.testing.assert_close(sampled(loaded, x, lambda y, _: loaded(y)), WANTED["module"], rtol=1e-4, atol=1e-5)
