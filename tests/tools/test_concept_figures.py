"""The pictures of docs/concepts: what they show is what the method does."""

import sys
from pathlib import Path

import pytest
import torch

import concept_figures


@pytest.mark.parametrize("compensated", [True, False])
def test_a_state_that_is_compensated_stays_within_half_a_rounding_step_and_the_other_leaves(compensated):
    values = torch.sin(torch.linspace(0, 3, 50))
    error = (concept_figures.sent(values, 0.12, compensated=compensated) - values).abs().max()
    assert (error <= 0.0601) == compensated


def test_it_draws_three_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(concept_figures, "BITS", (8, 4))
    monkeypatch.setattr(sys, "argv", ["concept_figures", "--steps", "3", "--folder", str(tmp_path)])
    concept_figures.main()
    assert {path.name for path in tmp_path.iterdir()} == {f"concept-{n}.png" for n in ("bits", "change", "loop")}
