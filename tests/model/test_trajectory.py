"""Trajectories and contexts on a whole model."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

import modiff
from modiff import ModiffWarning, StateError, presets
from modiff.model.attach import attachment_of
from modiff.model.trajectory import state_bytes
from tests.helpers import assert_same_bits
from tests.model.toys import activations_only, applied, assert_equal, generate, sample


def test_states_are_freed_when_the_body_raises_and_the_next_trajectory_is_a_fresh_one():
    model = applied(presets.w8a4())
    expected = generate(model)

    def interrupted() -> None:
        with modiff.trajectory(model):
            sample(model, steps=3, seed=5)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert state_bytes(model) == 0
    compiled = torch.compile(model, backend="eager")  # it has the trajectories of the model behind it
    assert_equal(generate(compiled), expected)


def test_trajectories_of_one_model_cannot_nest_and_the_outer_one_goes_on():
    model = applied(presets.w8a4())
    with modiff.trajectory(model):
        sample(model, steps=2)
        with pytest.raises(StateError, match="Toy: expected no running trajectory"), modiff.trajectory(model):
            pass
        assert state_bytes(model) > 0


def test_two_contexts_are_two_trajectories_side_by_side():
    model = applied(presets.tuned(8, 4))
    starts = {"cond": torch.randn(2, 3, 4, 4), "uncond": torch.randn(2, 3, 4, 4)}
    expected = {}

    def advance(x: Tensor, step: int) -> Tensor:
        with torch.no_grad():
            return x - 0.1 * model(x, 1000.0 - 100 * step)

    for name, x in starts.items():
        with modiff.trajectory(model):
            for step in range(5):
                x = advance(x, step)
        expected[name] = x
    with modiff.trajectory(model):
        for step in range(5):
            for name in starts:
                with modiff.context(model, name):
                    starts[name] = advance(starts[name], step)
    for name, x in starts.items():
        assert_same_bits(x, expected[name])


def test_a_context_ends_with_its_body_also_when_it_raises():
    model = applied(presets.w8a4())
    clock = attachment_of(model).clock
    with modiff.trajectory(model):
        with modiff.context(model, "cond"):
            with pytest.raises(ValueError, match="inner"), modiff.context(model, "inner"):
                raise ValueError(clock.context)
            assert clock.context == "cond"
        assert clock.context == "default"


def test_a_batch_that_changes_inside_is_refused_by_the_first_layer_that_sees_it():
    model = applied(presets.w8a4())
    with modiff.trajectory(model):
        sample(model, steps=1)
        with pytest.raises(StateError, match=r"body: expected an input of shape \(2, 16, 4, 4\) on cpu, got \(1, 16"):
            sample(model, steps=1, batch=1)


def test_the_timestep_reaches_the_clock_by_position_or_by_name():
    model, x = applied(activations_only(4)), torch.randn(2, 3, 4, 4)
    with modiff.trajectory(model), torch.no_grad():
        model(x, 1000.0)
        model(sample=x, timestep=torch.tensor(900))
        model(x, timestep=torch.tensor([850.0, 850.0]))
        assert float(attachment_of(model).clock.ratio) == 0.5
        assert attachment_of(model).clock.step == 2


class TwoReaders(nn.Module):
    """Two layers that read one tensor, between ends that are left alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.to_q, self.to_k, self.last = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.last(self.to_q(x) * self.to_k(x))


@pytest.mark.parametrize(
    ("config", "copies"), [(presets.plain(8, 8), 0), (presets.modulated(8, 4), 1), (presets.tuned(8, 4), 2)]
)
def test_state_bytes_by_hand_shared_inputs_once_and_each_context(config, copies):
    """Linear predictors keep the last move of each state from the second step on; plain layers keep nothing."""
    model, each = TwoReaders(), 4 * 3 * 16
    modiff.apply(model, config)
    with torch.no_grad(), modiff.trajectory(model):
        for count, name in enumerate(("cond", "uncond"), 1):
            with modiff.context(model, name):
                model(torch.randn(3, 16))
                model(torch.randn(3, 16))
            assert state_bytes(model) == count * copies * 3 * each


def test_a_third_evaluation_at_one_timestep_in_one_context_warns_once(monkeypatch):
    monkeypatch.setattr("modiff.errors._WARNED", set())
    model, x = applied(presets.w8a4()), torch.randn(2, 3, 4, 4)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always", ModiffWarning)
        for tiles in (("a", "b", "c"), ("default", "default", "default")):
            with modiff.trajectory(model), torch.no_grad():
                for t in (900.0, 800.0):
                    for tile in tiles:
                        with modiff.context(model, tile):
                            model(x, t)
                            model(x, torch.tensor(t))  # samplers of second order evaluate twice
            assert len(seen) == (tiles[0] == "default")
    assert "Toy: expected at most two evaluations at one timestep, got a third in the" in str(seen[0].message)
