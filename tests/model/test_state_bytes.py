"""State bytes: counted by hand on a small network, shared states once, nothing between trajectories."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from modiff import presets
from modiff.errors import StateError
from modiff.model.apply import install
from modiff.model.trajectory import model_context, model_trajectory, state_bytes

ROWS, WIDTH, OUT = 3, 16, 32


class Attention(nn.Module):
    """Two layers that read one tensor, and an end on either side that modiff leaves alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.to_q, self.to_k = nn.Linear(WIDTH, OUT), nn.Linear(WIDTH, OUT)
        self.last = nn.Linear(OUT, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.last(self.to_q(x) * self.to_k(x))


INPUT, OUTPUT = 4 * ROWS * WIDTH, 4 * ROWS * OUT


@pytest.mark.parametrize(("config", "copies"), [(presets.modulated(8, 4), 1), (presets.tuned(8, 4), 2)])
def test_a_shared_input_counts_once_and_both_outputs_count(config: object, copies: int) -> None:
    model = Attention()
    install(model, config)  # type: ignore[arg-type]
    with torch.no_grad(), model_trajectory(model):
        assert state_bytes(model) == 0
        model(torch.randn(ROWS, WIDTH))
        assert state_bytes(model) == INPUT + 2 * OUTPUT
        model(torch.randn(ROWS, WIDTH))
        # from the second step on the linear predictor keeps the last move of each state as well
        assert state_bytes(model) == copies * (INPUT + 2 * OUTPUT)
    assert state_bytes(model) == 0


def test_each_context_has_states_of_its_own() -> None:
    model = Attention()
    install(model, presets.w8a4())
    with torch.no_grad(), model_trajectory(model):
        for name in ("cond", "uncond"):
            with model_context(model, name):
                model(torch.randn(ROWS, WIDTH))
        assert state_bytes(model) == 2 * (INPUT + 2 * OUTPUT)


def test_plain_layers_keep_nothing() -> None:
    model = Attention()
    install(model, presets.plain(8, 8))
    with torch.no_grad(), model_trajectory(model):
        model(torch.randn(ROWS, WIDTH))
        assert state_bytes(model) == 0


def test_a_model_without_modiff_is_an_error() -> None:
    with pytest.raises(StateError, match="state_bytes: expected a model with modulated layers"):
        state_bytes(Attention())
